from __future__ import annotations

import errno
import re
import sys
import time
from pathlib import Path

import pytest
from letters import take
from local_ranks import open_local, run_local
from mpirun import mpirun, run_mpi
from seeded_schedule import PeerFailedError

from hpc_distkv.comm import abort
from hpc_distkv.comm.abort import aborting, end_job, failing, guarded
from hpc_distkv.comm.waiter import StallError
from hpc_distkv.errors import UserError

SCRIPT = str(Path(__file__).with_name("failing_rank.py"))
CLOCK = r"\d\d-\d\d \d\d:\d\d:\d\d  "
needs_mpirun = pytest.mark.skipif(mpirun() is None, reason="needs mpirun")


@needs_mpirun
@pytest.mark.parametrize(
    ("way", "ranks", "status", "said"),
    [
        ("exception", 3, 70, ["[rank 1 on ", "rank one has had enough", "Traceback"]),
        ("thread", 2, 70, ["[rank 1 on ", "by zero", "Traceback"]),
        ("leaves_too_early", 2, 70, ["[rank 0 on ", "waits for rank 1 on ", "that never comes"]),
        ("sleeps_in_round", 3, 70, ["[rank 0 on ", "no answer from rank 2 on ", "to agree"]),
        (
            "sleeps_in_step",
            3,
            70,
            ["[rank 0 on ", "no answer from rank 2 on ", "queries, layer 3", "headers of step 5"],
        ),
        ("sleeps_as_first", 3, 70, ["[rank 1 on ", "waits for rank 0 on ", "to agree"]),
        ("sleeps_in_call", 3, 70, ["[rank 0 on ", "no answer from rank 2 on ", "NCCL to connect"]),
        ("agreed", 2, 2, ["[None, 'no such file']"]),
        ("rows_failed", 2, 1, []),
    ],
)
def test_one_rank_takes_all_along(way, ranks, status, said):
    began = time.monotonic()
    ran = run_mpi(ranks, [SCRIPT, way], timeout=50)
    assert ran.returncode == status, ran.stderr
    for words in said:
        assert words in ran.stderr
    assert ("Traceback" in ran.stderr) == ("Traceback" in said), ran.stderr
    speakers = set(re.findall(rf"^{CLOCK}\[(rank \d+) on ", ran.stderr, re.MULTILINE))
    assert len(speakers) == bool(said) - (way == "agreed"), "one rank speaks for all"
    assert time.monotonic() - began < 30


def test_calls_that_end_in_time_end_nothing(capsys):
    comm = open_local(2, stall_timeout=0.2)[1]
    ended = []
    comm.abort = ended.append
    with guarded(comm, "a call", [0]):
        pass
    time.sleep(0.5)
    assert ended == []
    with guarded(comm, "a call that takes too long", [0]):
        time.sleep(0.8)
    assert ended == [70]
    assert "waits for rank 0: a call that takes too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            UserError("--block-size must be positive"),
            2,
            "[rank 1] --block-size must be positive\n",
        ),
        (UserError("a \x1b[2J\nb"), 2, "[rank 1] a \\x1b[2J\n[rank 1] b\n"),
        (KeyboardInterrupt(), 130, "[rank 1] interrupted\n"),
        (StallError("rank 1 waits for rank 0"), 70, "[rank 1] rank 1 waits for rank 0\n"),
        (SystemExit(7), 7, "[rank 1] left before the other ranks were done: exit status 7\n"),
        (SystemExit("no"), 1, "[rank 1] left before the other ranks were done: no\n"),
    ],
)
def test_last_words_and_status(error, status, said, capsys):
    comm = open_local(2)[1]
    ended = []
    comm.abort = ended.append
    with pytest.raises(type(error)), aborting(comm):
        raise error
    assert ended == [status]
    shown = capsys.readouterr().err
    assert re.sub(CLOCK, "", shown) == said
    assert len(re.findall(f"^{CLOCK}", shown, re.MULTILINE)) == said.count("\n")


class Stuck:
    """A pipe that nobody reads."""

    def write(self, _: str) -> None:
        time.sleep(5)


class Full:
    def write(self, _: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stderr", [Stuck(), Full(), None])
def test_an_abort_happens_whatever_becomes_of_its_message(stderr, monkeypatch):
    comm = open_local(2)[1]
    ended = []
    comm.abort = ended.append
    monkeypatch.setattr(abort, "WRITTEN", 0.2)
    monkeypatch.setattr(sys, "stderr", stderr)
    began = time.monotonic()
    end_job(comm, ValueError("mine"))
    assert ended == [70]
    assert time.monotonic() - began < 3


def test_what_all_ranks_raise_ends_no_job(capsys):
    comm = open_local(2)[1]
    ended = []
    comm.abort = ended.append
    comm.all_raise(error := UserError("no such file"))
    with pytest.raises(UserError), failing(comm):
        raise error
    assert ended == []
    with pytest.raises(ValueError, match="mine"), failing(comm):
        raise ValueError("mine")
    assert ended == [70]
    assert "[rank 1] mine" in capsys.readouterr().err


def test_in_a_world_of_one_exceptions_pass_through():
    (comm,) = open_local(1)
    with pytest.raises(ValueError, match="mine"), aborting(comm):
        raise ValueError("mine")


def test_threads_hear_of_a_failed_rank(capsys):
    def work(comm):
        with aborting(comm):
            if comm.world.rank == 1:
                raise ValueError("mine")
            comm.agree(None)

    with pytest.raises(ValueError, match="mine"):
        run_local(open_local(3), work)
    assert "[rank 1] mine" in capsys.readouterr().err


def test_a_failed_thread_rank_stops_the_others():
    stopped = []

    def work(comm):
        if comm.world.rank == 0:
            raise ValueError("mine")
        try:
            take(comm, [0], "mail that never comes")
        except PeerFailedError:
            stopped.append(comm.world.rank)
            raise

    with pytest.raises(ValueError, match="mine"):
        run_local(open_local(3), work)
    assert sorted(stopped) == [1, 2]
