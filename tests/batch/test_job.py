"""Every input row has exactly one output row, whatever it says."""

from __future__ import annotations

import errno
import gzip
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import (
    MIXED,
    MIXED_ROWS,
    ByteTokenizer,
    answer,
    chat,
    completion,
    make_service,
    open_journal,
    read_lines,
    run_job,
    write_lines,
)
from panicking import PANICS, save_panicking

from hpc_distkv.batch.errors import InputError, JournalError, RowError
from hpc_distkv.batch.input import intake as intake_module
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.service import SamplingDefaults
from hpc_distkv.batch.job import COMMIT_INTERVAL, Job, job_fingerprint
from hpc_distkv.control.messages.requests import UNREADABLE, Request, Result, pack_tokens
from hpc_distkv.model.tokenizer import Tokenizer


def test_every_row_is_answered_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", MIXED)
    job = run_job(tmp_path / "in", tmp_path / "out")
    rows = {row["id"]: row for row in read_lines(tmp_path / "out")}
    assert len(rows) == MIXED_ROWS == len(read_lines(tmp_path / "out"))
    codes = {key: row["error"] and row["error"]["code"] for key, row in rows.items()}
    assert codes == {
        "batch_req_0": None,
        "batch_req_1": "duplicate_custom_id",
        "batch_req_3": None,
        "batch_req_4": "invalid_json",
        "batch_req_5": "invalid_value",
        "batch_req_6": "invalid_value",
        "batch_req_7": "duplicate_custom_id",
        "batch_req_9": "duplicate_custom_id",
        "batch_req_10": "context_length_exceeded",
        "batch_req_11": None,
    }
    assert (job.answered, job.failed, job.skipped, job.total_rows) == (3, 7, 0, MIXED_ROWS)
    assert job.complete
    assert job.bytes_read == job.input_bytes == (tmp_path / "in").stat().st_size
    body = rows["batch_req_11"]["response"]["body"]
    assert body["choices"][0]["text"] == "ts"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


class PanicException(BaseException):
    """As pyo3 names what a panic of Rust raises: no `Exception`."""


class Failing(ByteTokenizer):
    """Fails at the letter x, wherever it comes."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def encode(self, text: str, *args: Any, **options: Any) -> list[int]:
        return [*map(self._look, super().encode(text, *args, **options))]

    def token_bytes(self, id: int) -> bytes:
        return super().token_bytes(self._look(id))

    def chat(self, messages: list[dict[str, Any]], most: int | None = None) -> list[int]:
        return [*map(self._look, super().chat(messages, most))]

    def _look(self, id: int) -> int:
        if id == ord("x"):
            raise self.error("at x\ud800")
        return id


@pytest.mark.parametrize("error", [PanicException, MemoryError, RecursionError, BaseException])
def test_whatever_a_tokenizer_raises_is_the_fault_of_one_row(
    error: type[BaseException], tmp_path: Path
) -> None:
    tokenizer = Failing(error)
    service = replace(make_service(), tokenizer=tokenizer, chat=tokenizer.chat)
    rows = [
        *(completion("text", "x"), chat("chat", "x"), completion("ids", [*b"ax"])),
        *(completion("echo", [*b"ax"], echo=True), completion("fine", "b")),
    ]
    write_lines(tmp_path / "in", rows)
    job = run_job(tmp_path / "in", tmp_path / "out", service)
    lines = {line["custom_id"]: line["error"] for line in read_lines(tmp_path / "out")}
    assert lines.pop("fine") is None
    assert {name: line["code"] for name, line in lines.items()} == {
        "text": "tokenization_failed",
        "chat": "tokenization_failed",
        "echo": "tokenization_failed",
        "ids": "unreadable",
    }
    for line in lines.values():
        assert line["message"].endswith(f"{error.__name__}: at x\\ud800")
    assert (job.answered, job.failed, job.complete) == (1, 4, True)
    again = run_job(tmp_path / "in", tmp_path / "out", service)
    assert (again.answered, again.failed, again.skipped) == (0, 0, 5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_fault_of_a_row(
    error: type[BaseException], tmp_path: Path
) -> None:
    service = replace(make_service(), tokenizer=Failing(error))
    write_lines(tmp_path / "in", [completion("a", "x")])
    with pytest.raises(error):
        run_job(tmp_path / "in", tmp_path / "out", service)


def test_a_real_panic_of_the_library_is_an_error_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    save_panicking(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    service = replace(
        make_service(),
        tokenizer=tokenizer,
        chat=lambda messages, most: tokenizer.encode(messages[0]["content"], most=most),
    )
    rows = [completion("text", PANICS), chat("chat", PANICS), completion("fine", "aa")]
    write_lines(tmp_path / "in", rows)
    job = run_job(tmp_path / "in", tmp_path / "out", service)
    lines = {line["custom_id"]: line for line in read_lines(tmp_path / "out")}
    assert lines["fine"]["error"] is None
    for name in ("text", "chat"):
        error = lines[name]["error"]
        assert error["code"] == "tokenization_failed"
        assert "PanicException: " in error["message"]
    assert (job.answered, job.failed, job.complete) == (1, 2, True)


def test_a_text_that_the_engine_could_not_search_is_an_error_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", stop="x", n=2)])
    job = Job(Intake(tmp_path / "in"), open_journal(tmp_path / "out", {}), make_service())
    first, second = job.requests()
    job.finish(Result(first.id, pack_tokens([65]), UNREADABLE, 0.1, 0.2))
    job.finish(answer(second))
    job.close()
    [line] = read_lines(tmp_path / "out")
    assert (line["error"]["code"], line["response"]["status_code"]) == ("unreadable", 500)
    assert (job.answered, job.failed, job.complete) == (0, 1, True)


def test_rerun_of_a_finished_job_adds_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", MIXED)
    run_job(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    job = run_job(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == before
    assert (job.answered, job.failed, job.skipped) == (0, 0, MIXED_ROWS)
    assert job.failed_before == 7


def test_custom_ids_of_answered_rows_are_not_kept_twice(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", MIXED)
    run_job(tmp_path / "in", tmp_path / "out")
    journal = open_journal(tmp_path / "out", job_fingerprint("f00d", "tiny", SamplingDefaults()))
    assert journal.answered.custom_ids == {*"abcde"}
    job = Job(Intake(tmp_path / "in"), journal, make_service())
    assert list(job.requests()) == []
    assert not journal.answered.custom_ids


def test_answered_rows_are_not_tokenized_again(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, [completion("a"), chat("b")])
    run_job(source, output)
    service = make_service()
    object.__setattr__(service, "tokenizer", None)
    object.__setattr__(service, "chat", None)
    assert run_job(source, output, service).skipped == 2


def test_rows_appended_to_the_input_are_answered_by_a_rerun(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, [completion("a")])
    run_job(source, output)
    write_lines(source, [completion("a"), completion("b")])
    assert run_job(source, output).answered == 1


def test_reading_is_lazy(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i), "x" * 80) for i in range(10_000)])
    job = Job(Intake(tmp_path / "in"), open_journal(tmp_path / "out", {}), make_service())
    requests = job.requests()
    next(requests)
    assert job.in_flight == 1
    assert job.bytes_read < 1000
    assert job.total_rows is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"{}\n"), "is compressed: unpack it"),
        ("{}\n".encode("utf-16"), "is not in UTF-8: convert it"),
    ],
    ids=["gzip", "utf-16"],
)
def test_files_of_another_kind_are_refused_whole(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(InputError, match=said):
        Intake(tmp_path / "in")


def test_bom_crlf_and_a_missing_last_newline(tmp_path: Path) -> None:
    lines = [json.dumps(completion(name)).encode() for name in "ab"]
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert run_job(tmp_path / "in", tmp_path / "out").answered == 2


def test_empty_input(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\n\n")
    job = run_job(tmp_path / "in", tmp_path / "out")
    assert (job.total_rows, job.complete) == (0, True)


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("length", [499, 500, 501, 999, 1000, 1001, 2500])
def test_endless_lines_are_one_error_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, end: bytes
) -> None:
    monkeypatch.setattr(intake_module, "LONGEST_LINE", 500)
    rows = [json.dumps(completion("a")).encode(), b"x" * length]
    content = b"\n".join(rows) + (end and end + json.dumps(completion("b")).encode())
    (tmp_path / "in").write_bytes(content)
    run_job(tmp_path / "in", tmp_path / "out")
    results = {row["id"]: row for row in read_lines(tmp_path / "out")}
    torn = length < 500 and not end
    assert len(results) == 2 + bool(end) - torn
    if torn:
        return
    code = "invalid_json" if length < 500 else "line_too_long"
    assert results["batch_req_1"]["error"]["code"] == code
    assert not end or results["batch_req_2"]["custom_id"] == "b"


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    for path in (tmp_path / "missing", tmp_path, "-", tmp_path / "pipe", "/dev/null"):
        with pytest.raises(InputError):
            Intake(path)
    os.close(writer)


def test_a_read_error_stops_the_job_and_keeps_what_was_answered(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(3)])
    intake = Intake(tmp_path / "in")
    job = Job(intake, open_journal(tmp_path / "out", {}), make_service())

    class Failing:
        def readline(self, limit: int) -> bytes:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            pass

    requests = job.requests()
    job.finish(answer(next(requests)))
    intake._file = Failing()  # type: ignore[assignment]
    with pytest.raises(InputError, match="Input/output error"):
        next(requests)
    job.close()
    assert len(read_lines(tmp_path / "out")) == 1


def test_lines_are_written_while_the_disk_is_slow_and_are_all_on_it_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(10)])
    job = Job(Intake(tmp_path / "in"), open_journal(tmp_path / "out", {}), make_service())
    go_on, begun, now = threading.Event(), threading.Event(), time.monotonic()
    synced: list[int] = []

    def fsync(fd: int) -> None:
        size = os.fstat(fd).st_size
        begun.set()
        assert go_on.wait(20)
        synced.append(size)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "fsync", fsync)
    syncing = threading.Thread(target=job.sync)
    for number, request in enumerate(job.requests(), start=1):
        job.finish(answer(request))
        assert not job.write()
        now += COMMIT_INTERVAL
        assert job.write()
        assert len(read_lines(tmp_path / "out")) == number
        if number == 1:
            syncing.start()
            assert begun.wait(20)
    go_on.set()
    syncing.join()
    first, whole = synced[0], (tmp_path / "out").stat().st_size
    assert synced == [first]
    assert 0 < first < whole
    job.commit()
    assert synced == [first, whole]
    job.commit()
    assert synced == [first, whole], "all lines are on the disk"
    job.close()


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_after_a_failed_write_rows_stay_in_flight_and_their_answers_are_kept_for_the_rerun(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [completion(str(i), "hello") for i in range(4)]
    write_lines(tmp_path / "in", [*lines, completion("bad", n=0)])
    job = Job(Intake(tmp_path / "in"), open_journal(tmp_path / "out", {}), make_service())
    entries = job.entries()

    def next_request() -> Request:
        entry, [request] = next(entries)
        job.enter(entry)
        return request

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job.finish(answer(next_request()))
    job.commit()
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        second = next_request()
        job.finish(answer(second))
        with pytest.raises(JournalError, match="No space left"):
            job.commit()
    third, fourth = next_request(), next_request()
    assert job.finish(answer(third)) is None
    job.refuse(fourth.id, RowError("too long"))
    for entry, _ in entries:
        job.enter(entry)
    assert not job.complete
    job.commit()
    job.close()
    job.release()
    assert [row["custom_id"] for row in read_lines(tmp_path / "out")] == ["0"]
    rerun = Job(Intake(tmp_path / "in"), open_journal(tmp_path / "out", {}), make_service())
    assert [request.id for request in rerun.requests()] == [second.id, fourth.id]
    rerun.close()
    assert [row["custom_id"] for row in read_lines(tmp_path / "out")] == ["0", "2", "bad"]


def test_commits_are_rate_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(1000)])
    count = 0

    def fsync(fd: int) -> None:
        nonlocal count
        count += 1

    monkeypatch.setattr(os, "fsync", fsync)
    began = time.monotonic()
    run_job(tmp_path / "in", tmp_path / "out")
    assert count <= 10 + (time.monotonic() - began)
