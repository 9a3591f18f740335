"""Messages that both sides must ask for at the same time: nobody ever stands in anybody's way."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from local_ranks import leftovers, open_local, run_local
from recorded_fabric import connect
from seeded_schedule import SeededSchedule
from test_staged import PROMISES

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

    comm.waiter.always(serve)
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
