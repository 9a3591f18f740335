"""Rows are read ahead so far and no further, results are handled in their order, and nothing hangs
when it is stopped."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import completion, make_service, open_journal, run_job, write_lines

from hpc_distkv.batch import threads
from hpc_distkv.batch.errors import InputError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.threads import Reader, Writer
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.model.tokenizer import Tokenizer

SECONDS = 20.0
Entries = Iterator[tuple[int, Sequence[Request]]]


def request(number: int, length: int = 1) -> Request:
    return Request(number, pack_tokens(range(length)), Sampling(max_tokens=1))


def rows(count: int | None = None, length: int = 1) -> Entries:
    numbers = itertools.count() if count is None else range(count)
    return ((number, [request(number, length)]) for number in numbers)


def soon(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while not (value := what()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(1e-3)
    return value


def all_of(reader: Reader[Any]) -> list[int]:
    taken = []
    while not reader.ended:
        if (found := reader.take()) is not None:
            taken.append(found.id)
    assert reader.take() is None
    return taken


@pytest.fixture
def alone() -> Iterator[None]:
    """No thread is left."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def started(entries: Entries, tell: Callable[[Any], None] = lambda _: None) -> Reader[int]:
    reader = Reader(entries, tell)
    reader.start()
    return reader


# -- the reader ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_requests_come_in_order_and_each_is_told_of_before(monkeypatch):
    monkeypatch.setattr(threads, "MOST_REQUESTS", 7)
    told: list[int] = []
    reader = started(rows(500), told.append)
    taken = []
    while not reader.ended:
        if (found := reader.take()) is not None:
            assert found.id in told
            taken.append(found.id)
    reader.stop()
    assert taken == told == list(range(500))


@pytest.mark.usefixtures("alone")
def test_nobody_waits_for_a_row_that_is_not_there_yet():
    go_on = threading.Event()

    def slow() -> Entries:
        yield 0, [request(0)]
        go_on.wait(SECONDS)
        yield 1, []
        yield 2, [request(2), request(3)]

    reader = started(slow())
    assert soon(reader.take).id == 0
    assert [reader.take() for _ in range(100)] == [None] * 100
    assert (reader.ended, reader.waits) == (False, False)
    go_on.set()
    assert all_of(reader) == [2, 3]
    assert reader.waits
    reader.stop()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("length", "ahead"), [(1, 10), (30, 4), (1000, 1)])
def test_as_many_rows_and_tokens_are_read_ahead_as_may_be_and_one_row_beyond(
    monkeypatch, length, ahead
):
    monkeypatch.setattr(threads, "MOST_REQUESTS", 10)
    monkeypatch.setattr(threads, "MOST_TOKENS", 100)
    read: list[int] = []
    reader = started(rows(length=length), read.append)
    for taken in range(0, 10 * ahead, ahead):
        soon(lambda: reader.waits)
        assert len(reader._requests) == ahead
        assert len(read) <= taken + ahead + 1
        assert [soon(reader.take).id for _ in range(ahead)] == [*range(taken, taken + ahead)]
    reader.stop()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [InputError("cannot read"), KeyboardInterrupt("a panic")])
def test_what_fails_in_reading_is_told_last_and_ends_the_source(error):
    def failing() -> Entries:
        yield from rows(3)
        raise error

    told: list[Any] = []
    reader = started(failing(), told.append)
    assert all_of(reader) == [0, 1, 2]
    reader.stop()
    assert told == [0, 1, 2, error]


@pytest.mark.usefixtures("alone")
def test_a_reader_that_waits_for_room_can_be_stopped(monkeypatch):
    monkeypatch.setattr(threads, "MOST_REQUESTS", 2)
    reader = started((n, [request(n)] * 5) for n in itertools.count())
    soon(lambda: reader.waits)
    reader.stop()
    assert reader.ended or reader.waits
    assert "reader" not in {thread.name for thread in threading.enumerate()}
    reader.stop()


@pytest.mark.usefixtures("alone")
def test_the_loop_goes_on_while_a_long_prompt_is_tokenized(tiny_model: Path):
    tokenizer, text = Tokenizer(tiny_model), "once upon a time " * 200_000

    def tokenized() -> Entries:
        yield len(tokenizer.encode(text)), []

    reader = started(tokenized())
    times = [time.perf_counter()]
    while not reader.ended:
        assert reader.take() is None
        time.sleep(1e-4)
        times.append(time.perf_counter())
    reader.stop()
    longest = max(after - before for before, after in itertools.pairwise(times))
    assert longest < (times[-1] - times[0]) / 3


def open_job(folder: Path, rows: Sequence[Any]) -> Job:
    write_lines(folder / "in", rows)
    service = make_service()
    fingerprint = job_fingerprint("f00d", service.model_names[0], service.defaults)
    journal = open_journal(folder / "out", fingerprint, source=folder / "in")
    return Job(Intake(folder / "in"), journal, service)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("bad", [False, True], ids=["answered", "errors"])
def test_no_row_that_makes_no_request_holds_up_who_waits_for_one(tmp_path: Path, bad: bool) -> None:
    fields = {"n": 0} if bad else {}
    lines = [completion(str(number), **fields) for number in range(20)]
    if not bad:
        write_lines(tmp_path / "in", lines)
        run_job(tmp_path / "in", tmp_path / "out")
    before = threading.active_count()  # a claim has one
    job = open_job(tmp_path, [*lines, completion("last")])
    reader = Reader(job.entries(), job.enter)
    reader.start()
    assert len(all_of(reader)) == 1
    reader.stop()
    assert (job.skipped, job.failed) == ((0, 20) if bad else (20, 0))
    assert (job.total_rows, job.in_flight) == (21, 1)
    job.release()
    soon(lambda: threading.active_count() == before)


def test_reading_ends_in_the_midst_of_rows_that_are_passed_over(tmp_path: Path) -> None:
    lines = [completion(str(number)) for number in range(20)]
    write_lines(tmp_path / "in", lines)
    run_job(tmp_path / "in", tmp_path / "out")
    job = open_job(tmp_path, [completion("first"), *lines, completion("last")])
    reading = job.entries()
    next(reading)
    job.stop_reading()
    assert list(reading) == []
    assert (job.skipped, job.total_rows, job.complete) == (0, None, False)
    job.close()


# -- the writer ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_what_is_put_is_handled_in_its_order_and_before_the_end():
    handled: list[int] = []
    rests = itertools.count()
    writer = Writer(handled.append, lambda: next(rests))
    for number in range(100):
        writer.put(number)
    writer.start()
    writer.stop()
    writer.stop()
    assert handled == list(range(100))
    assert next(rests) >= 100


@pytest.mark.usefixtures("alone")
def test_who_puts_never_waits_but_the_reader_does_while_too_much_is_left(monkeypatch):
    monkeypatch.setattr(threads, "MOST_ENTRIES", 3)
    go_on = threading.Event()
    handled: list[int] = []

    def handle(number: int) -> None:
        go_on.wait(SECONDS)
        handled.append(number)

    writer = Writer(handle, lambda: None)
    writer.start()
    put: list[int] = []

    def read() -> None:
        for number in range(10):
            writer.put_bounded(number)
            put.append(number)

    reader = threading.Thread(target=read)
    reader.start()
    soon(lambda: len(put) == 3)
    for number in range(100, 200):
        writer.put(number)
    assert put == [0, 1, 2]
    assert handled == []
    go_on.set()
    reader.join()
    writer.stop()
    assert sorted(handled) == [*range(10), *range(100, 200)]
    assert [n for n in handled if n < 100] == list(range(10))


@pytest.mark.usefixtures("alone")
def test_a_writer_that_gets_nothing_rests_all_the_same(monkeypatch):
    monkeypatch.setattr(threads, "PAUSE", 1e-3)
    rests: list[int] = []
    writer = Writer(print, lambda: rests.append(1))
    writer.start()
    soon(lambda: len(rests) > 3)
    writer.stop()
