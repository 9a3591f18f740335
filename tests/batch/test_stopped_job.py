"""A job that is stopped keeps what it has begun of its rows, and a rerun goes on from there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from batch_fakes import (
    EOS,
    answer,
    completion,
    make_service,
    open_journal,
    read_lines,
    run_job,
    summaries,
    write_lines,
)

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.job import Job
from hpc_distkv.batch.results.side_files import unfinished_path
from hpc_distkv.control.messages.requests import (
    Request,
    Result,
    Unfinished,
    pack_tokens,
    unpack_tokens,
)


def open_job(folder: Path, **settings: int) -> Job:
    return Job(Intake(folder / "in"), open_journal(folder / "out", {}), make_service(**settings))


def begin(job: Job, request: Request, tokens: int) -> bytes:
    """Stop a request after so many tokens of its `answer`."""
    output = answer(request).tokens[: 4 * tokens]
    job.save(Unfinished(request.id, output, b"l" * tokens))
    return output


def test_a_rerun_hands_out_what_was_begun(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i), "hello") for i in range(3)])
    job = open_job(tmp_path)
    first, second, third = job.requests()
    job.finish(answer(first))
    output = begin(job, second, 2)
    job.close()
    again = open_job(tmp_path)
    assert list(again.requests()) == [
        msgspec.structs.replace(second, output=output, logprobs=b"ll"),
        third,
    ]
    assert again.begun_tokens == 2
    again.close()


def test_what_was_begun_outlives_stops_before_its_turn_and_ends_with_the_job(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in", [completion(str(i), "hello") for i in range(3)])
    job = open_job(tmp_path)
    *_, last = job.requests()
    output = begin(job, last, 3)
    job.close()
    stopped = open_job(tmp_path)
    stopped.finish(answer(next(stopped.requests())))
    stopped.close()
    job = open_job(tmp_path)
    requests = list(job.requests())
    assert [request.output for request in requests] == [b"", output]
    for request in requests:
        job.finish(answer(request))
    assert job.begun_tokens == 0
    job.close()
    assert not unfinished_path(tmp_path / "out").exists()
    assert len(read_lines(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "other"}, {"temperature": 0.5}, {"seed": 3}, {"logprobs": 2}, {"max_tokens": 2}],
)
def test_a_row_that_was_changed_begins_anew(changed: dict, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello", max_tokens=9)])
    job = open_job(tmp_path)
    begin(job, next(job.requests()), 2)
    job.close()
    write_lines(
        tmp_path / "in", [completion("a", **{"prompt": "hello", "max_tokens": 9, **changed})]
    )
    [request] = open_job(tmp_path).requests()
    assert request.output == b""


def test_more_memory_for_an_open_end_is_no_other_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello")])
    job = open_job(tmp_path, max_model_len=50)
    output = begin(job, next(job.requests()), 2)
    job.close()
    [request] = open_job(tmp_path, max_model_len=90).requests()
    assert request.output == output


def test_other_answers_of_a_row_that_were_ready_are_not_made_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello", n=3, logprobs=1)])
    job = open_job(tmp_path)
    first, second, third = job.requests()
    job.finish(answer(second))
    begin(job, third, 1)
    job.close()
    again = open_job(tmp_path)
    requests = list(again.requests())
    assert [request.id for request in requests] == [first.id, third.id]
    assert [len(unpack_tokens(request.output)) for request in requests] == [0, 1]
    for request in requests:
        again.finish(answer(request))
    again.close()
    (tmp_path / "whole").mkdir()
    run_job(tmp_path / "in", tmp_path / "whole" / "out")
    assert summaries(tmp_path / "out") == summaries(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("reason", "tokens", "limit", "fits"),
    [
        ("length", 5, 5, True),
        ("length", 5, 4, False),
        ("length", 5, 6, False),
        ("stop", 3, 5, True),
        ("stop", 3, 50, True),
        ("stop", 3, 4, True),
        ("stop", 3, 3, False),  # the stop token may have been one more
        ("stop", 3, 2, False),
        ("stop token", 3, 3, True),
        ("stop token", 3, 2, False),
        ("stop string", 3, 3, True),
    ],
)
def test_a_whole_answer_is_kept_if_another_limit_makes_no_other_one_of_it(
    reason: str, tokens: int, limit: int, fits: bool, tmp_path: Path
) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello", n=2, max_tokens=5)])
    job = open_job(tmp_path)
    first, _ = job.requests()
    made = [65] * (tokens - 1) + [EOS if reason == "stop token" else 65]
    end = 1 if reason == "stop string" else None
    reason = reason.split()[0]
    job.finish(Result(first.id, pack_tokens(made), reason, 0.1, 0.2, text_end=end))
    job.close()
    write_lines(tmp_path / "in", [completion("a", "hello", n=2, max_tokens=limit)])
    assert len([*open_job(tmp_path).requests()]) == 2 - fits


@pytest.mark.parametrize("other", [{"model": "other"}, {}])
def test_results_dropped_by_overwrite_take_what_was_begun_along(
    other: dict[str, str], tmp_path: Path
) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello")])
    job = open_job(tmp_path)
    begin(job, next(job.requests()), 2)
    job.close()
    assert unfinished_path(tmp_path / "out").exists()
    journal = open_journal(tmp_path / "out", other, overwrite=True)
    assert journal.unfinished == {}
    assert not unfinished_path(tmp_path / "out").exists()
    journal.close()


def test_a_full_disk_leaves_the_results_and_what_was_begun_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in", [completion(str(i), "hello") for i in range(3)])
    job = open_job(tmp_path)
    begin(job, next(job.requests()), 2)
    job.close()
    kept = unfinished_path(tmp_path / "out").read_bytes()
    job = open_job(tmp_path)
    first, second, _ = job.requests()
    job.finish(answer(first))
    begin(job, second, 2)

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(JournalError, match="No space left"):
        job.close()
    monkeypatch.undo()
    assert unfinished_path(tmp_path / "out").read_bytes() == kept
    assert len(read_lines(tmp_path / "out")) == 1
    assert not list(tmp_path.glob("*.tmp"))
    assert [r.output for r in open_job(tmp_path).requests()] == [b"", b""]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello")])
    run = open_job(tmp_path)
    list(run.requests())
    run.close()
    unfinished_path(tmp_path / "out").write_bytes(b"{torn\n")
    with pytest.raises(JournalError, match=r"out\.unfinished\.jsonl does not hold"):
        open_job(tmp_path)


def test_tokens_are_bytes_on_the_way_and_text_in_the_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", "hello")])
    job = open_job(tmp_path)
    request = next(job.requests())
    job.save(Unfinished(request.id, pack_tokens([0, 255, 299])))
    job.close()
    [line] = read_lines(unfinished_path(tmp_path / "out"))
    assert (line["custom_id"], line["choice"]) == ("a", 0)
    [again] = open_job(tmp_path).requests()
    assert again.output == pack_tokens([0, 255, 299])
