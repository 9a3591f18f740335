"""What a program that uses the library is told about its arguments, on all ranks alike."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_job import completion
from local_ranks import open_local, run_local
from safetensors.torch import load_file, save_file
from seeded_schedule import SeededSchedule
from sync_threads import SyncReader, SyncWriter

from hpc_distkv import Engine, EngineOptions
from hpc_distkv.batch import job, threads
from hpc_distkv.batch.errors import InputError, JournalError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.job import Job
from hpc_distkv.batch.results import journal
from hpc_distkv.batch.results.files import Files
from hpc_distkv.batch.results.journal import Journal
from hpc_distkv.batch.results.order import InputOrder
from hpc_distkv.comm import binding
from hpc_distkv.comm.gpu.nccl import NcclError
from hpc_distkv.comm.together import RankError, SetupError
from hpc_distkv.comm.transport import Comm
from hpc_distkv.comm.waiter import StallClock, StallError
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.observe.live import leader
from hpc_distkv.observe.live.progress import ProgressReport
from hpc_distkv.observe.live.watch import Watch
from hpc_distkv.ranks.interrupt import Interrupt

RANKS = 2
STALL = 60.0
OPTIONS = EngineOptions(dtype="float32", num_blocks=16, block_size=16, threads=1)


def bytes_in(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"body": b"bytes"}


def numbers_of_numpy(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"body": {"prompt": list(np.arange(5, 9)), "max_tokens": 2}}


@pytest.mark.parametrize("spoil", [bytes_in, numbers_of_numpy])
def test_a_row_that_json_cannot_hold_is_named_and_the_engine_goes_on(spoil, tiny_model: Path):
    good = completion("good", [5, 6], 2)

    def work(comm: Comm) -> list[dict[str, Any]]:
        engine = Engine(tiny_model, OPTIONS, comm=comm)
        with pytest.raises(SetupError, match=r"rows\[1\] cannot be written as JSON"):
            engine.generate([good, spoil(good)])
        return engine.generate([good])

    [[answer], nothing] = run_local(open_local(RANKS), work)
    assert answer["error"] is None
    assert nothing == []


@pytest.mark.parametrize("rows", ["Hello", completion("a", "Hello", 2), None, 5])
def test_what_is_no_list_of_rows_is_refused(rows, tiny_model: Path):
    def work(comm: Comm) -> None:
        with pytest.raises(SetupError, match="rows must be a list of batch rows"):
            Engine(tiny_model, OPTIONS, comm=comm).generate(rows)

    run_local(open_local(RANKS), work)


class OddError(Exception):
    """That nobody expects."""


def rows_that_fail(error: BaseException) -> Iterator[dict[str, Any]]:
    yield completion("never", [5, 6], 2)
    raise error


def raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("error", [OddError("no more rows"), KeyboardInterrupt("no more rows")])
def test_what_the_rows_of_rank_0_raise_reaches_all_ranks_and_the_engine_goes_on(
    error, tiny_model: Path
):
    good = completion("good", [5, 6], 2)
    comms = open_local(RANKS)
    aborts: list[int] = []

    def work(comm: Comm) -> tuple[BaseException | None, list[dict[str, Any]]]:
        comm.abort = aborts.append
        with Engine(tiny_model, OPTIONS, comm=comm) as engine:
            said = raised(lambda: engine.generate(rows_that_fail(error)))
            return said, engine.generate([good])

    (own, [answer]), (told, nothing) = run_local(comms, work)
    assert own is error
    assert isinstance(told, RankError)
    assert str(told) == f"rank 0 failed: {type(error).__name__}: no more rows"
    assert answer["error"] is None
    assert nothing == []
    assert aborts == []


def test_what_all_ranks_raise_leaves_the_block_without_ending_the_job(tiny_model: Path):
    comms = open_local(RANKS)
    aborts: list[int] = []

    def work(comm: Comm) -> None:
        comm.abort = aborts.append
        with Engine(tiny_model, OPTIONS, comm=comm) as engine:
            engine.generate(rows_that_fail(OddError()))

    said = run_local(comms, lambda comm: raised(lambda: work(comm)))
    assert [type(error) for error in said] == [OddError, RankError]
    assert aborts == []
    assert all(comm.closed for comm in comms)


def a_full_disk(patch: pytest.MonkeyPatch) -> None:
    """After two writes."""
    writes = iter(range(1000))

    def check(self: Journal) -> None:
        if next(writes) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(job, "COMMIT_INTERVAL", 0.0)
    patch.setattr(Journal, "_check_alone", check)


def a_row_that_cannot_be_written(patch: pytest.MonkeyPatch) -> None:
    finish, rows = Job.finish, iter(range(1000))

    def fail(self: Job, result: Any) -> Any:
        if next(rows) == 3:
            raise OddError("a bug")
        return finish(self, result)

    patch.setattr(Job, "finish", fail)


def a_row_that_cannot_be_read(patch: pytest.MonkeyPatch) -> None:
    parse, rows = job.parse_row, iter(range(1000))

    def fail(*given: Any) -> Any:
        if next(rows) == 3:
            raise OddError("another bug")
        return parse(*given)

    patch.setattr(job, "parse_row", fail)


def a_file_that_cannot_be_read_to_its_end(patch: pytest.MonkeyPatch) -> None:
    readline, lines = Intake._readline, iter(range(1000))

    def fail(self: Intake) -> bytes:
        if next(lines) == 20:
            raise InputError("the disk is gone")
        return readline(self)

    patch.setattr(Intake, "_readline", fail)


class Panic(BaseException):
    """As of Rust."""


def a_reader_that_panics(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise Panic("index out of bounds")

    patch.setattr(job, "parse_row", fail)


def a_report_that_fails(patch: pytest.MonkeyPatch) -> None:
    def show(*_: object) -> None:
        raise OddError("nothing to be seen")

    patch.setattr(ProgressReport, "due", True)
    patch.setattr(ProgressReport, "show", show)


class FailingLog(io.StringIO):
    """From its n-th write on."""

    def __init__(self, sound: int, error: Exception, terminal: bool = False) -> None:
        super().__init__()
        self.sound, self.error, self.terminal = sound, error, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, _: str) -> int:
        self.sound -= 1
        if self.sound < 0:
            raise self.error
        return 0


FULL = OSError(errno.ENOSPC, "No space left on device")
CLOSED = ValueError("I/O operation on closed file")


@pytest.mark.parametrize(
    "log",
    [FailingLog(0, FULL), FailingLog(1, CLOSED), FailingLog(0, FULL, terminal=True)],
)
def test_a_log_that_cannot_be_written_ends_no_run(
    log: FailingLog, tiny_model: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(ProgressReport, "due", True)
    files = Files(tmp_path / "in", tmp_path / "out")
    files.input.write_text(json.dumps(completion("a", [5, 6], 3)) + "\n")
    [figures] = run_local(
        open_local(1),
        lambda comm: Engine(tiny_model, OPTIONS, comm=comm).run(files, ProgressReport(log)),
    )
    assert log.sound < 0
    assert figures["rows"]["answered"] == 1


def test_a_run_that_cannot_begin_leaves_its_files_to_the_next(
    tiny_model: Path, tmp_path: Path, monkeypatch
):
    def fail(*_: object) -> None:
        raise OddError("a bug")

    files = Files(tmp_path / "in", tmp_path / "out")
    files.input.write_text(json.dumps(completion("a", [5, 6], 3)) + "\n")

    def work(comm: Comm) -> dict[str, Any] | None:
        engine = Engine(tiny_model, OPTIONS, comm=comm)
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "begin", fail)
            assert isinstance(raised(lambda: engine.run(files)), OddError)
        return engine.run(files)

    [figures] = run_local(open_local(1), work)
    assert figures["rows"]["answered"] == 1


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (a_full_disk, JournalError, "No space left"),
        (a_row_that_cannot_be_written, OddError, "a bug"),
        (a_row_that_cannot_be_read, OddError, "another bug"),
        (a_file_that_cannot_be_read_to_its_end, InputError, "the disk is gone"),
        (a_reader_that_panics, Panic, "index out of bounds"),
        (a_report_that_fails, OddError, "nothing to be seen"),
    ],
)
def test_a_fault_of_rank_0_ends_the_run_on_all_ranks_and_a_rerun_completes_it(
    spoil, kind, said, tiny_model: Path, tmp_path: Path
):
    files = Files(tmp_path / "in", tmp_path / "out")
    rows = [completion(str(number), [5, 6 + number], 9, ignore_eos=True) for number in range(40)]
    files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EngineOptions(dtype="float32", num_blocks=8, block_size=16, max_num_seqs=2, threads=1)
    everybody = threading.Barrier(RANKS)

    def work(comm: Comm) -> tuple[BaseException | None, Any, int]:
        engine = Engine(tiny_model, options, comm=comm)
        with pytest.MonkeyPatch.context() as patch:
            if first := comm.world.rank == 0:
                spoil(patch)
            before = threading.active_count()
            error = raised(lambda: engine.run(files, ProgressReport() if first else None))
            everybody.wait(STALL)
        assert threading.active_count() == before
        assert not list(tmp_path.glob("*.claim"))
        lines = len(files.output.read_text().splitlines())
        everybody.wait(STALL)
        return error, engine.run(files), lines

    (own, figures, lines), (told, _, _) = run_local(open_local(RANKS, STALL), work)
    assert isinstance(own, kind)
    assert said in str(own)
    assert isinstance(told, RankError)
    assert said in str(told)
    assert lines < len(rows), "the run has ended early"
    assert figures["rows"]["answered"] == len(rows) - lines
    done = [json.loads(line)["custom_id"] for line in files.output.read_text().splitlines()]
    assert sorted(done) == sorted(row["custom_id"] for row in rows)


def hang(patch: pytest.MonkeyPatch, place: Any, name: str, go_on: threading.Event) -> None:
    """From the 21st call on."""
    real, calls = getattr(place, name), itertools.count()

    def slow(*given: Any) -> Any:
        if next(calls) >= 20:
            go_on.wait(10)
        return real(*given)

    patch.setattr(place, name, slow)


@pytest.mark.parametrize(
    ("place", "name", "what"),
    [(Intake, "_readline", "read .*/in"), (Journal, "write", "write .*/out")],
    ids=["read", "write"],
)
def test_a_disk_that_hangs_ends_the_job_after_the_stall_timeout(
    place, name, what, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "COMMIT_INTERVAL", 0.0)
    monkeypatch.setattr(threads, "MOST_ENTRIES", 30)
    go_on = threading.Event()
    hang(monkeypatch, place, name, go_on)
    files = Files(tmp_path / "in", tmp_path / "out")
    rows = [completion(str(number), [5, 6 + number], 2) for number in range(100)]
    files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comms = open_local(RANKS, 1.0)
    aborts: list[int] = []
    comms[0].abort = aborts.append
    before = threading.active_count()

    def work(comm: Comm) -> BaseException | None:
        return raised(lambda: Engine(tiny_model, OPTIONS, comm=comm).run(files))

    own, _ = run_local(comms, work)
    assert isinstance(own, StallError)
    assert re.fullmatch(f"rank 0 waits for its disk, to {what}: nothing moved for 1 s", str(own))
    assert aborts == [70]
    go_on.set()
    end = time.monotonic() + STALL
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(1e-3)


def test_rows_are_written_while_fsync_hangs_which_ends_the_job_at_last(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "COMMIT_INTERVAL", 0.0)
    go_on = threading.Event()

    def fsync(_: int) -> None:
        if threading.current_thread().name == "writer":
            go_on.wait(STALL)

    monkeypatch.setattr(os, "fsync", fsync)
    files = Files(tmp_path / "in", tmp_path / "out")
    rows = [completion(str(number), [5, 6 + number], 2) for number in range(20)]
    files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [comm] = open_local(1, 0.1)

    def work(comm: Comm) -> BaseException | None:
        return raised(lambda: Engine(tiny_model, OPTIONS, comm=comm).run(files))

    [own] = run_local([comm], work)
    assert isinstance(own, StallError)
    assert "rank 0 waits for its disk, to write " in str(own)
    assert len(files.output.read_text().splitlines()) == len(rows)
    go_on.set()


def test_a_thread_that_cannot_be_started_ends_the_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: threads.Reader[Any]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads.Reader, "start", fail)
    files = Files(tmp_path / "in", tmp_path / "out")
    files.input.write_text(json.dumps(completion("a", [5, 6], 3)) + "\n")

    def work(comm: Comm) -> BaseException | None:
        engine, before = Engine(tiny_model, OPTIONS, comm=comm), threading.active_count()
        error = raised(lambda: engine.run(files))
        assert threading.active_count() == before
        return error

    [error] = run_local(open_local(1), work)
    assert "can't start new thread" in str(error)
    assert not list(tmp_path.glob("*.claim"))


def test_a_run_ends_while_its_reader_waits_for_room_and_the_engine_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(threads, "MOST_REQUESTS", 1)
    files = Files(tmp_path / "in", tmp_path / "out")
    rows = [completion(str(number), [5, 6 + number], 9, ignore_eos=True) for number in range(40)]
    files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = replace(OPTIONS, max_num_seqs=2)

    def work(comm: Comm) -> list[dict[str, Any] | None]:
        engine = Engine(tiny_model, options, comm=comm)
        interrupt, before = Interrupt(), threading.active_count()
        interrupt.ask(0)
        stopped = engine.run(files, interrupt=interrupt)
        assert threading.active_count() == before
        return [stopped, engine.run(files)]

    [[stopped, completed]] = run_local(open_local(1, STALL), work)
    assert (stopped["stopped"], completed["stopped"]) == (True, False)
    assert stopped["rows"]["answered"] + completed["rows"]["answered"] == len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_without_threads_a_run_gives_the_same_lines(
    seed: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the order of what the ranks do."""
    rows = [completion(str(number), [5, 6 + number], 9, ignore_eos=True) for number in range(12)]
    rows[7]["body"]["n"] = 0

    def lines(name: str) -> list[Any]:
        files = Files(tmp_path / "in", tmp_path / name)
        files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
        comms = open_local(RANKS, STALL, schedule=SeededSchedule(seed))
        figures, _ = run_local(
            comms, lambda comm: Engine(tiny_model, OPTIONS, comm=comm).run(files)
        )
        assert (figures["rows"]["answered"], figures["rows"]["failed"]) == (11, 1)
        found = map(json.loads, files.output.read_text().splitlines())
        return sorted(
            (row["custom_id"], str(row["response"]["body"].get("choices"))) for row in found
        )

    threaded = lines("threads")
    monkeypatch.setattr(leader, "Reader", SyncReader)
    monkeypatch.setattr(leader, "Writer", SyncWriter)
    assert lines("none") == threaded


def test_ranks_are_patient_while_the_first_one_puts_the_results_in_order(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Meanwhile any wait has lasted for more than the stall timeout at its first look."""
    ordering, waits = threading.Event(), threading.Event()
    look, order_lines = StallClock.look, journal.order_lines

    def long_since(clock: StallClock) -> float:
        if not ordering.is_set():
            return look(clock)
        waits.set()
        return 2 * STALL

    def slowly(path: Path, order: InputOrder) -> None:
        ordering.set()
        assert waits.wait(STALL), "the other rank waits"
        order_lines(path, order)
        ordering.clear()

    monkeypatch.setattr(StallClock, "look", long_since)
    monkeypatch.setattr(journal, "order_lines", slowly)
    rows = [completion(str(number), [5, 6], 2) for number in range(4)]
    files = Files(tmp_path / "in", tmp_path / "out", ordered=True)
    files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, nothing = run_local(
        open_local(RANKS, STALL), lambda comm: Engine(tiny_model, OPTIONS, comm=comm).run(files)
    )
    assert figures is not None
    assert figures["rows"]["answered"] == 4
    assert nothing is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampling": {"temperature": math.nan}}, r"sampling: Expected `float` .* `\$.temp"),
        ({"sampling": {"top_p": "high"}}, r"sampling: Expected `float`, got `str` .* `\$.top_p"),
        ({"sampling": {"seed": 2**64}}, r"sampling: Expected `int` .* `\$.seed"),
        ({"sampling": {"temprature": 1}}, "sampling: .* unknown field `temprature`"),
        ({"max_model_len": 4097}, "max-model-len 4097: .* is made for 4096 tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_weights_are_read(
    arguments, said, tiny_model: Path
):
    def work(comm: Comm) -> None:
        with pytest.raises(SetupError, match=said):
            Engine(tiny_model, OPTIONS, comm=comm, **arguments)

    run_local(open_local(RANKS), work)


def rerun(model: Path, files: Files, options: EngineOptions = OPTIONS) -> dict[str, Any]:
    """The figures of a run that resumes."""

    def work(comm: Comm) -> dict[str, Any] | None:
        return Engine(model, options, comm=comm).run(files)

    figures = run_local(open_local(1), work)[0]
    assert figures is not None
    return figures


def test_results_are_resumed_with_the_model_that_they_are_of_and_no_other(
    tiny_model: Path, tmp_path: Path
):
    files = Files(tmp_path / "in", tmp_path / "out")
    files.input.write_text(json.dumps(completion("a", [5, 6], 2)) + "\n")
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert rerun(model, files)["rows"]["answered"] == 1
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    (tmp_path / "out.meta.json").write_text(  # as the version before wrote it
        json.dumps(meta | {"model": ModelConfig.from_dir(model).fingerprint})
    )
    moved = model.rename(tmp_path / "moved")
    assert rerun(moved, files)["rows"]["answered_before"] == 1
    assert json.loads((tmp_path / "out.meta.json").read_text())["model"] == meta["model"]
    with pytest.raises(SetupError, match=r'--dtype was "float32", now "bfloat16"'):
        rerun(moved, files, replace(OPTIONS, dtype="bfloat16"))
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match="job: the content of the weights is another"):
        rerun(moved, files)


def test_a_fault_while_the_model_loads_ends_the_job_with_a_sentence(
    tiny_model: Path, monkeypatch, capsys
):
    def bind(*_: object) -> None:
        raise NcclError("NCCL cannot connect the ranks")

    monkeypatch.setattr(binding, "bind", bind)
    with pytest.raises(NcclError):
        run_local(open_local(RANKS), lambda comm: Engine(tiny_model, OPTIONS, comm=comm))
    said = capsys.readouterr().err
    assert "[rank 0] NCCL cannot connect the ranks\n" in said
    assert "Traceback" not in said
