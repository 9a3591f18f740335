"""NCCL's calls as this program makes them, against a library that moves bytes between threads and
blocks wherever NCCL may block."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from group_contract import parts_are_joined_on_lane_0, totals_are_float32_sums_in_the_order_of_lanes
from local_ranks import leftovers, open_local, run_local
from test_group import in_steps
from test_meeting_transport import LOANS, step_of_instance
from test_staged import PROMISES

from hpc_distkv.comm.gpu.fabric import Message
from hpc_distkv.comm.gpu.meeting_transport import MeetingTransport
from hpc_distkv.comm.gpu.nccl import Nccl, NcclError, refusal, usable
from hpc_distkv.comm.transport import Comm

LONG = 20.0


class Library:
    """`cupy.cuda.nccl`: a group's end, and making and destroying a communicator, return when all
    other ranks that they concern have made the same call."""

    NCCL_UINT8 = 1

    class NcclError(Exception):
        pass

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.posts: defaultdict[tuple, deque[list]] = defaultdict(deque)
        self.joined: defaultdict[bytes, int] = defaultdict(int)
        self.left: defaultdict[bytes, int] = defaultdict(int)
        self.ids = 0
        self.groups = threading.local()
        library = self

        class NcclCommunicator:
            def __init__(self, size: int, identity: bytes, rank: int) -> None:
                assert 0 <= rank < size
                self.size, self.identity, self.rank = size, identity, rank
                library.come(library.joined, identity, size)

            def send(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
                self.post((self.identity, self.rank, peer), True, pointer, count, dtype)

            def recv(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
                self.post((self.identity, peer, self.rank), False, pointer, count, dtype)

            def post(self, pair: tuple, send: bool, pointer: int, count: int, dtype: int) -> None:
                assert dtype == library.NCCL_UINT8
                assert 0 <= pair[1] < self.size > pair[2] >= 0
                library.groups.posts.append((pair, send, [pointer, count, False]))

            def check_async_error(self) -> None:
                pass

            def destroy(self) -> None:
                library.come(library.left, self.identity, self.size)

        self.NcclCommunicator = NcclCommunicator
        self.groupStart, self.groupEnd = self.start_group, self.end_group

    def get_unique_id(self) -> bytes:
        with self.change:
            self.ids += 1
            return self.ids.to_bytes(128, "big")

    def come(self, counts: dict[bytes, int], identity: bytes, size: int) -> None:
        with self.change:
            counts[identity] += 1
            self.change.notify_all()
            assert self.change.wait_for(lambda: counts[identity] >= size, LONG)

    def start_group(self) -> None:
        self.groups.posts = []

    def end_group(self) -> None:
        mine = [post for _, _, post in self.groups.posts]
        with self.change:
            for pair, send, post in self.groups.posts:
                other = self.posts[*pair, not send]
                if other:
                    match = other.popleft()
                    assert match[1] == post[1]
                    source, target = (post, match) if send else (match, post)
                    ctypes.memmove(target[0], source[0], source[1])
                    match[2] = post[2] = True
                else:
                    self.posts[*pair, send].append(post)
            self.change.notify_all()
            assert self.change.wait_for(lambda: all(post[2] for post in mine), LONG), "stuck"


class Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@pytest.fixture
def library(monkeypatch) -> Library:
    found = Library()
    package = SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(nccl=found))
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", package.cuda)
    monkeypatch.setattr("hpc_distkv.comm.gpu.nccl.passed", lambda stream=None: Passed())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(Nccl, "holds", lambda self, tensor: True)
    return found


def connected(comm: Comm) -> None:
    fabric = Nccl(comm, range(comm.world.size), SimpleNamespace(cuda_stream=8))
    way = MeetingTransport(comm.transport, fabric, comm.new_mail(), comm.waiter)
    comm.transport = way
    comm.waiter.always(way.push)


@pytest.mark.parametrize(
    "promise",
    [
        *PROMISES,
        in_steps(totals_are_float32_sums_in_the_order_of_lanes),
        in_steps(parts_are_joined_on_lane_0),
        lambda comm: step_of_instance(comm, LOANS, apart={2}),
    ],
)
def test_ranks_whose_hosts_block_in_every_call_keep_the_contract(library, promise):
    def work(comm: Comm) -> None:
        connected(comm)
        promise(comm)
        comm.close()

    comms = open_local(6, stall_timeout=LONG, tp=2)
    run_local(comms, work)
    assert leftovers(comms) == []
    assert library.left == library.joined


@pytest.mark.parametrize("missing", ["start", "close"])
def test_a_rank_that_does_not_come_ends_the_job_in_time(library, missing, capsys):
    """Its start is the first call that waits for all, its close the last."""
    comms = open_local(3, stall_timeout=0.5)
    ended, over = [], threading.Event()

    def work(comm: Comm) -> None:
        comm.abort = lambda status: (ended.append(status), over.set())
        hangs = comm.world.rank == 2
        if hangs and missing == "start":
            comm.share("")
            return
        fabric = Nccl(comm, range(3), SimpleNamespace(cuda_stream=8))
        if not hangs:
            fabric.close()

    def run() -> None:
        with suppress(Exception):
            run_local(comms, work)

    threading.Thread(target=run, daemon=True).start()
    began = time.monotonic()
    assert over.wait(20)
    assert time.monotonic() - began < 10
    assert ended[0] == 70
    said = capsys.readouterr().err
    assert "rank 2: NCCL to " + ("connect its GPU" if missing == "start" else "let go of") in said


def test_what_nccl_refuses_is_said(library):
    (comm,) = open_local(1)
    fabric = Nccl(comm, range(1))

    def refuse(*_: int) -> None:
        raise library.NcclError("unhandled system error")

    fabric._communicator.send = refuse
    with pytest.raises(NcclError, match="refuses messages with rank 0: unhandled system error"):
        fabric.meet([Message(0, True, torch.zeros(1))])


def test_a_peer_that_is_gone_ends_the_job_even_if_giving_up_hangs(library, capsys):
    (comm,) = open_local(1, stall_timeout=0.3)
    fabric, ended = Nccl(comm, range(1)), threading.Event()
    comm.abort = lambda status: ended.set()

    def gone() -> None:
        raise KeyError(6)  # what CuPy makes of codes that it has no name for

    fabric._communicator.check_async_error = gone
    fabric._communicator.abort = lambda: ended.wait(LONG)
    with pytest.raises(NcclError, match="a GPU of another rank does not answer any more: 6"):
        fabric.check()
    assert ended.is_set()
    assert "NCCL to give up after 6: nothing moved for 0.3 s" in capsys.readouterr().err


class FakeNccl:
    available = True
    version = 22907

    def get_version(self) -> int:
        return self.version


def pretend(monkeypatch, cupy: str, version: int) -> None:
    """CuPy of this release with this NCCL, beside torch with NCCL 2.28.9."""
    library = FakeNccl()
    library.version = version
    package = SimpleNamespace(__version__=cupy, cuda=SimpleNamespace(nccl=library))
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", package.cuda)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))


def test_two_versions_of_nccl_in_a_process_are_explained(monkeypatch):
    pretend(monkeypatch, "14.2.0", 22809)
    assert usable() == (22809, "")
    pretend(monkeypatch, "14.2.0", 22907)
    version, why = usable()
    assert version == 0
    assert "CuPy loaded NCCL 22907 and torch 22809" in why


def test_a_cupy_that_is_missing_or_too_old_is_said_with_what_to_install(monkeypatch):
    pretend(monkeypatch, "13.6.0", 22809)
    assert "older than 14" in usable()[1]
    monkeypatch.setitem(sys.modules, "cupy", None)
    version, why = usable()
    assert version == 0
    assert "pip install 'hpc-distkv[cuda13]'" in why


def test_ranks_whose_libraries_differ_are_refused_with_the_versions():
    assert refusal([(22809, ""), (22809, "")]) is None
    assert "rank 1 has 22907" in refusal([(22809, ""), (22907, "")])
    assert refusal([(22809, ""), (0, "CuPy is missing")]) == "rank 1: CuPy is missing"
