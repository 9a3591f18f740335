"""Hops and meetings of one rank: it is never in both, and nobody waits for ever."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from local_ranks import leftovers, open_local, run_local
from recorded_fabric import connect
from seeded_schedule import SeededSchedule
from test_meetings import LAYERS, answers

from hpc_distkv.comm.collective.group import Group
from hpc_distkv.comm.transport import Comm
from hpc_distkv.comm.waiter import StallError


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


def hop_of_both(comms: list[Comm]) -> None:
    lanes = []
    for comm, x, y in zip(comms[:2], torch.ones(2, 3), torch.zeros(2, 3), strict=True):
        peer = 1 - comm.world.rank
        hop = partial(comm.transport.stream_ordered.exchange, [(peer, x)], [(peer, y)])
        lanes.append(threading.Thread(target=hop))
        lanes[-1].start()
    for lane in lanes:
        lane.join()


def may_enqueue(comm: Comm) -> bool:
    return comm.transport.stream_ordered._may_enqueue


def test_no_meeting_begins_before_hops_have_passed_and_no_hop_before_meetings():
    comms = open_local(4, tp=2)
    fabric = connect(comms)
    run_local(comms, lambda comm: comm.transport.unite(comm))
    hop_of_both(comms)
    assert may_enqueue(comms[0]), "nobody waits for anything"
    asking = comms[0].transport.exchange([], [(2, torch.zeros(3))])
    assert not may_enqueue(comms[0]), "if that is met soon, it waits for one hop at most"
    fabric.pass_mark(fabric.marks[0])
    assert not may_enqueue(comms[0]), "it is ready, and the other side is not"
    fabric.pass_mark(fabric.tails[0])
    assert may_enqueue(comms[0])
    hop_of_both(comms)
    arriving = comms[2].transport.exchange([(0, torch.ones(3))], [(0, torch.zeros(3))])
    leaving = comms[0].transport.exchange([(2, torch.ones(3))], [])
    assert not may_enqueue(comms[0]), "what it has for others is not ready yet"
    for marks in fabric.marks:
        while marks:
            fabric.pass_mark(marks)
    for pending in (arriving, leaving, asking, arriving):
        assert not pending.done()
    assert fabric.meetings == []
    assert not may_enqueue(comms[0]), "it would hop on and on, and the meeting would wait"
    fabric.pass_mark(fabric.tails[0])
    for pending in (leaving, arriving):
        assert not pending.done()
    assert fabric.meetings == [(0, 2, 2), (2, 0, 2)]
    assert not may_enqueue(comms[0])
    fabric.meet(0, 2)
    assert may_enqueue(comms[0])


def test_no_hop_is_asked_for_before_others_can_have_what_is_for_them():
    comms = open_local(4, tp=2)
    fabric = connect(comms)
    run_local(comms, lambda comm: comm.transport.unite(comm))
    for peer in (2, 0):  # also if that is the rank itself, which has not posted the receive
        comms[0].transport.exchange([(peer, torch.ones(3))], [])
        assert not may_enqueue(comms[0])
        fabric.pass_mark(fabric.marks[0])
        assert may_enqueue(comms[0])


def test_a_hop_that_waits_for_one_before_it_names_the_others_of_the_instance():
    comms = open_local(4, tp=2, stall_timeout=0.5)
    connect(comms)
    run_local(comms, lambda comm: comm.transport.unite(comm))
    hop_of_both(comms)
    comms[0].transport.exchange([], [(2, torch.zeros(3))])
    with pytest.raises(StallError) as stalled:
        comms[0].transport.stream_ordered.exchange([(1, torch.ones(3))], [(1, torch.zeros(3))])
    assert stalled.value.awaited == (1,)


def test_tensors_that_the_fabric_does_not_hold_do_not_hop():
    comms = open_local(2, tp=2)
    connect(comms)
    x, host = torch.ones(3), torch.ones(3, dtype=torch.int16)
    assert comms[0].transport.stream_ordered is None, "it is not united"
    run_local(comms, lambda comm: comm.transport.unite(comm))
    assert not comms[0].transport.stream_ordered.exchange([(1, x)], [(1, host)])
    assert comms[0].transport.stream_ordered._last is None


class Step:
    """Stands for a recorded step with two hops, which is computed again where a GPU repeats it."""

    def __init__(self, comm: Comm) -> None:
        self.comm, self.x, self.y = comm, torch.ones(3), torch.zeros(3)
        self.resets = 0

    def replay(self) -> None:
        peer = 1 - self.comm.world.rank
        ordered = self.comm.transport.stream_ordered
        with ordered.recording(self):
            for _ in range(2):
                assert ordered.exchange([(peer, self.x)], [(peer, self.y)])
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
        group.begin(independent=True)
        step.replay()  # as it is recorded
        assert transport.stream_ordered._last is None, "a captured stream has no events"
        queries = 6 * (comm.world.rank == 0)
        arriving = [transport.exchange([], [(2, torch.zeros(5))]) for _ in range(queries)]
        for _ in range(5):
            group.begin(independent=True)
            group.replay(step)
            assert transport.stream_ordered._last is not None
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
