"""Messages that both sides must ask for at the same time: nobody ever stands in anybody's way."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from recorded_fabric import connect
from test_staged import PROMISES

from hpc_distkv.comm.group import Group
from hpc_distkv.comm.local import leftovers, open_local, run_local
from hpc_distkv.comm.nccl import refusal, usable
from hpc_distkv.comm.schedule import SeededSchedule
from hpc_distkv.comm.transport import TO_CREDITOR, TO_DEBTOR, Comm
from hpc_distkv.comm.waiter import StallError

LAYERS = 4


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_interleavings_of_meetings_keep_the_contract(promise, seed):
    comms = open_local(2 + seed % 2, schedule=SeededSchedule(seed))
    connect(comms)
    run_local(comms, promise)
    assert leftovers(comms) == []


def debts(seed: int, ranks: int) -> dict[int, dict[int, int]]:
    """Debtor → creditor → rows: up to three creditors each, circles and both ways included."""
    rng = random.Random(seed)
    return {
        debtor: {
            creditor: rng.randint(1, 5)
            for creditor in rng.sample(
                [r for r in range(ranks) if r != debtor], k=min(3, ranks - 1)
            )
            if rng.random() < 0.7
        }
        for debtor in range(ranks)
    }


def query(debtor: int, creditor: int, layer: int, rows: int) -> torch.Tensor:
    return torch.arange(8.0 * rows).add_(1000 * debtor + 100 * creditor + 10 * layer)


def answers(
    comm: Comm,
    graph: dict[int, dict[int, int]],
    then: Callable[[], object] = list,
) -> None:
    """The exchanges of one step, as debtors and creditors make them: a debtor posts the queries of
    a layer to all creditors and waits; a creditor answers when it polls, and never waits. `then`
    follows in each layer."""
    me, transport = comm.world.rank, comm.transport
    visits = {debtor: Visit(comm, debtor, owed[me]) for debtor, owed in graph.items() if me in owed}

    def serve() -> None:
        for visit in visits.values():
            visit.advance()

    comm.waiter.background.append(serve)
    for layer in range(LAYERS):
        sent = [(c, query(me, c, layer, rows)) for c, rows in graph[me].items()]
        got = [(c, torch.zeros(8 * rows)) for c, rows in graph[me].items()]
        transport.exchange(sent, got, TO_CREDITOR, TO_DEBTOR).wait(f"layer {layer}")
        for (_, question), (_, answer) in zip(sent, got, strict=True):
            assert torch.equal(answer, question + 0.5)
        then()
    comm.idle(lambda: all(visit.over for visit in visits.values()) or None, "debtors")


class Visit:
    def __init__(self, comm: Comm, debtor: int, rows: int) -> None:
        self.comm, self.debtor = comm, debtor
        self.queries, self.answer = torch.zeros(8 * rows), torch.zeros(8 * rows)
        self.layer, self.sent = 0, []
        self.receive()

    def receive(self) -> None:
        recvs = [(self.debtor, self.queries)]
        self.arriving = self.comm.transport.exchange([], recvs, TO_DEBTOR, TO_CREDITOR)

    @property
    def over(self) -> bool:
        self.sent = [pending for pending in self.sent if not pending.done()]
        return self.layer == LAYERS and not self.sent

    def advance(self) -> None:
        while self.layer < LAYERS and self.arriving.done():
            torch.add(self.queries, 0.5, out=self.answer)
            self.layer += 1
            if self.layer < LAYERS:
                self.receive()
            sends = [(self.debtor, self.answer)]
            self.sent.append(self.comm.transport.exchange(sends, [], TO_DEBTOR, TO_CREDITOR))


@pytest.mark.parametrize("seed", range(12))
def test_any_debts_are_served_whatever_ends_when(seed):
    ranks = 2 + seed % 7
    graph = debts(seed, ranks)
    comms = open_local(ranks, schedule=SeededSchedule(seed))
    fabric = connect(comms)
    run_local(comms, lambda comm: answers(comm, graph))
    assert leftovers(comms) == []
    assert fabric.heads == [None] * ranks
    total = 4 * LAYERS * sum(len(owed) for owed in graph.values())
    assert sum(messages for _, _, messages in fabric.meetings) == total


def test_a_circle_of_debts_is_served():
    graph = {0: {1: 2}, 1: {2: 2}, 2: {0: 2}}
    for seed in range(6):
        comms = open_local(3, schedule=SeededSchedule(seed))
        connect(comms)
        run_local(comms, lambda comm: answers(comm, graph))
        assert leftovers(comms) == []


def step_of_instance(comm: Comm, graph: dict[int, dict[int, int]], apart: set[int]) -> None:
    """One step of a rank in an instance of two, with a sum in every layer; those of the instances
    `apart` wait for no other."""
    comm.transport.unite(comm)
    group, world = Group(comm), comm.world
    group.begin(world.instance in apart)

    def total() -> None:
        x = torch.full((5,), 1.0 + world.rank)
        assert (group.total(x) == 3 + 2 * world.members[0]).all()

    answers(comm, graph, total)


LOANS = {0: {2: 2, 4: 1}, 1: {3: 2, 5: 1}, 2: {0: 3}, 3: {1: 3}, 4: {}, 5: {}}
"""Instances 0 and 1 are debtors of each other, and 0 of instance 2 too."""


@pytest.mark.parametrize("seed", range(12))
def test_hops_and_meetings_never_stand_in_each_others_way(seed):
    comms = open_local(6, tp=2, schedule=SeededSchedule(seed))
    fabric = connect(comms)
    run_local(comms, lambda comm: step_of_instance(comm, LOANS, apart={2}))
    assert leftovers(comms) == []
    assert fabric.hops == [(4, 5)] * LAYERS


def test_debtors_of_each_other_may_not_hop():
    """Which is why steps that wait for other instances do not."""

    def try_seeds() -> None:
        for seed in range(100):
            comms = open_local(6, tp=2, schedule=SeededSchedule(seed))
            connect(comms)
            run_local(comms, lambda comm: step_of_instance(comm, LOANS, apart={0, 1, 2}))

    with pytest.raises(StallError, match="stands still in a hop"):
        try_seeds()


def test_no_meeting_begins_before_hops_have_passed_and_no_hop_before_meetings():
    comms = open_local(4, tp=2)
    fabric = connect(comms)
    run_local(comms, lambda comm: comm.transport.unite(comm))

    def hop_of_both() -> None:
        lanes = []
        for comm, x, y in zip(comms[:2], torch.ones(2, 3), torch.zeros(2, 3), strict=True):
            peer = 1 - comm.world.rank
            hop = partial(comm.transport.hop, [(peer, x)], [(peer, y)])
            lanes.append(threading.Thread(target=hop))
            lanes[-1].start()
        for lane in lanes:
            lane.join()

    hop_of_both()
    assert comms[0].transport._may_hop, "nobody waits for anything"
    asking = comms[0].transport.exchange([], [(2, torch.zeros(3))])
    assert not comms[0].transport._may_hop, "if that is met soon, it waits for one hop at most"
    fabric.pass_mark(fabric.tails[0])
    assert comms[0].transport._may_hop
    hop_of_both()
    arriving = comms[2].transport.exchange([(0, torch.ones(3))], [(0, torch.zeros(3))])
    leaving = comms[0].transport.exchange([(2, torch.ones(3))], [])
    assert not comms[0].transport._may_hop, "what it has for others is not ready yet"
    for marks in fabric.marks:
        while marks:
            fabric.pass_mark(marks)
    for pending in (arriving, leaving, asking, arriving):
        assert not pending.done()
    assert fabric.meetings == []
    assert not comms[0].transport._may_hop, "it would hop on and on, and the meeting would wait"
    fabric.pass_mark(fabric.tails[0])
    for pending in (leaving, arriving):
        assert not pending.done()
    assert fabric.meetings == [(0, 2, 2), (2, 0, 2)]
    assert not comms[0].transport._may_hop
    fabric.meet(0, 2)
    assert comms[0].transport._may_hop


class Step:
    """Stands for a recorded step with two hops, which is computed again where a GPU repeats it."""

    def __init__(self, comm: Comm) -> None:
        self.comm, self.x, self.y = comm, torch.ones(3), torch.zeros(3)
        self.resets = 0

    def replay(self) -> None:
        peer = 1 - self.comm.world.rank
        with self.comm.transport.recording(self):
            for _ in range(2):
                assert self.comm.transport.hop([(peer, self.x)], [(peer, self.y)])
                torch.add(self.y, 1, out=self.x)

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("seed", range(8))
def test_recorded_hops_and_meetings_never_stand_in_each_others_way(seed):
    """The fabric asserts that a rank is never in both."""
    comms = open_local(4, tp=2, schedule=SeededSchedule(seed))
    fabric = connect(comms)
    steps = []

    def debtor(comm: Comm) -> None:
        for _ in range(6):
            comm.transport.exchange([(0, torch.ones(5))], []).wait("a query")

    def creditor(comm: Comm) -> None:
        step, transport = Step(comm), comm.transport
        group = Group(comm)
        group.begin(apart=True)
        step.replay()  # as it is recorded
        assert transport._hop is None, "there is no event on a stream that is recorded"
        queries = 6 * (comm.world.rank == 0)
        arriving = [transport.exchange([], [(2, torch.zeros(5))]) for _ in range(queries)]
        for _ in range(5):
            group.begin(apart=True)
            group.replay(step)
            assert transport._hop is not None
        for query in arriving:
            query.wait("a query")
        assert step.x.tolist() == [13.0] * 3
        steps.append(step)

    def work(comm: Comm) -> None:
        comm.transport.unite(comm)
        if comm.world.rank < 2:
            creditor(comm)
        elif comm.world.rank == 2:
            debtor(comm)
        comm.close()

    run_local(comms, work)
    assert leftovers(comms) == []
    assert fabric.hops == [(0, 1)] * 12
    assert [step.resets for step in steps] == [1, 1], "what is recorded goes before its fabric"


def test_what_is_ready_together_goes_in_one_meeting():
    comms = open_local(2)
    fabric = connect(comms)
    sends, into = [torch.full((3,), float(i)) for i in range(4)], torch.zeros((4, 3))
    leaving = comms[0].transport.exchange([(1, tensor) for tensor in sends], [])
    arriving = comms[1].transport.exchange([], [(0, row) for row in into])
    for marks in fabric.marks:
        fabric.pass_mark(marks)
    for pending in (arriving, leaving, arriving):
        assert not pending.done()
    assert fabric.meetings == [(0, 1, 4), (1, 0, 4)]
    fabric.meet(0, 1)
    assert leaving.done()
    assert arriving.done()
    assert into[:, 0].tolist() == [0, 1, 2, 3]


def test_nothing_is_asked_for_before_the_kernels_before_it_are_over():
    comms = open_local(2)
    fabric = connect(comms)
    leaving = comms[0].transport.exchange([(1, torch.ones(3))], [])
    arriving = comms[1].transport.exchange([], [(0, torch.zeros(3))])
    for late in (1, 0):
        assert not any([leaving.done(), arriving.done(), leaving.done(), arriving.done()])
        assert fabric.meetings == []
        fabric.pass_mark(fabric.marks[late])
    assert not any([leaving.done(), arriving.done(), leaving.done(), arriving.done()])
    assert fabric.meetings == [(0, 1, 1), (1, 0, 1)]


def test_a_fabric_that_fails_while_a_rank_waits_is_no_silent_wait():
    comms = open_local(2)
    fabric = connect(comms)
    arriving = comms[1].transport.exchange([], [(0, torch.zeros(3))])
    comms[0].transport.exchange([(1, torch.ones(3))], [])
    for marks in fabric.marks:
        fabric.pass_mark(marks)
    for comm in (comms[1], comms[0], comms[1]):
        comm.transport.push()
    fabric.failure = RuntimeError("rank 0 is gone")
    with pytest.raises(RuntimeError, match="rank 0 is gone"):
        arriving.wait("the send of a rank that is gone")


def test_a_wait_for_a_tensor_of_the_host_names_who_owes_it():
    comms = open_local(2, stall_timeout=0.1)
    connect(comms)
    arriving = comms[1].transport.exchange([], [(0, torch.zeros(3, dtype=torch.int16))])
    with pytest.raises(StallError, match="rank 1 waits for rank 0: a step") as stalled:
        arriving.wait("a step to begin")
    assert stalled.value.awaited == (0,)


def test_messages_of_different_sizes_are_refused():
    comms = open_local(2)
    fabric = connect(comms)
    comms[1].transport.exchange([], [(0, torch.zeros(3))])
    comms[0].transport.exchange([(1, torch.ones(4))], [])
    for marks in fabric.marks:
        fabric.pass_mark(marks)
    comms[1].transport.push()
    with pytest.raises(AssertionError, match="rank 1 posted 12 bytes where 16 were expected"):
        comms[0].transport.push()


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
