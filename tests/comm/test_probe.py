"""The costs of messages between instances, and the tournament in which they are measured."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from local_ranks import leftovers, open_local, run_local
from mpirun import mpirun, run_mpi
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.collective import probe as module
from hpc_distkv.comm.collective.probe import opponent, probe, turns
from hpc_distkv.comm.transport import TO_CREDITOR, Exchange, Transport
from hpc_distkv.comm.waiter import StallError

SCRIPT = str(Path(__file__).with_name("probe_ranks.py"))


class Watched(Transport):
    """Notes who exchanges how many bytes with whom, and is slow towards some ranks."""

    def __init__(self, inner, slow=()):
        self.inner, self.slow = inner, slow
        self.sent, self.received = [], []

    def exchange(self, sends, recvs, send_on=TO_CREDITOR, receive_on=TO_CREDITOR) -> Exchange:
        for peer, _ in sends:
            if peer in self.slow:
                time.sleep(0.05)
        self.sent += [(peer, tensor.nbytes) for peer, tensor in sends]
        self.received += [(peer, tensor.nbytes) for peer, tensor in recvs]
        return self.inner.exchange(sends, recvs, send_on, receive_on)

    def drained(self):
        return self.inner.drained()


def watched(ranks, slow_pair=(), **options):
    """Local ranks whose exchanges are noted, and slow both ways between the two of `slow_pair`."""
    comms = open_local(ranks, **{"stall_timeout": 20, **options})
    for comm in comms:
        rank = comm.world.rank
        slow = set(slow_pair) - {rank} if rank in slow_pair else set()
        comm.transport = Watched(comm.transport, slow)
    return comms


def assert_plausible(costs, instances):
    """Costs of the right shape: symmetric, free within an instance, positive between two."""
    round_trip, bandwidth = costs
    assert len(round_trip) == len(bandwidth) == instances
    for matrix, own in ((round_trip, 0.0), (bandwidth, math.inf)):
        for i, row in enumerate(matrix):
            assert len(row) == instances
            assert row[i] == own
            assert row == [other[i] for other in matrix]
            assert all(0 < cost < math.inf for j, cost in enumerate(row) if j != i)


@pytest.mark.parametrize("n", [*range(1, 18), 64, 65])
def test_a_tournament_has_every_pair_once_and_disjoint_pairs_per_round(n):
    met = []
    for turn in range(turns(n)):
        others = {i: opponent(i, turn, n) for i in range(n)}
        pairs = {(i, j) for i, j in others.items() if j is not None}
        assert all(i != j and 0 <= j < n and (j, i) in pairs for i, j in pairs)
        met += sorted(pair for pair in pairs if pair[0] < pair[1])
    assert sorted(met) == list(itertools.combinations(range(n), 2))


@pytest.mark.parametrize("n", range(2, 12))
def test_a_tournament_has_no_needless_rounds(n):
    assert turns(n) == (n if n % 2 else n - 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_costs_come_out_on_rank_0_for_every_two_instances(ranks):
    comms = open_local(ranks, stall_timeout=20)
    costs, *others = run_local(comms, lambda comm: probe(comm, 1000, 100_000))
    assert_plausible(costs, ranks)
    assert others == [None] * (ranks - 1)
    assert leftovers(comms) == []


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_two_ranks_exchange_queries_and_capped_blocks(ranks):
    comms = watched(ranks)
    run_local(comms, lambda comm: probe(comm, 1000, 1 << 40, repeats=3))
    for comm in comms:
        expected = []
        for peer in set(range(ranks)) - {comm.world.rank}:
            expected += [(peer, 1000)] * 3 + [(peer, 4 << 20)] * 2
        assert sorted(comm.transport.sent) == sorted(comm.transport.received) == sorted(expected)


def test_a_single_instance_sends_nothing():
    comms = watched(2, tp=2)
    for comm in comms:
        comm.rounds = None
    assert run_local(comms, lambda comm: probe(comm, 1000, 1000)) == [([[0.0]], [[math.inf]]), None]
    assert [comm.transport.sent for comm in comms] == [[], []]


def test_only_first_lanes_are_measured():
    comms = watched(6, tp=2)
    costs, *others = run_local(comms, lambda comm: probe(comm, 1000, 1000))
    assert_plausible(costs, 3)
    assert others == [None] * 5
    firsts = {0, 2, 4}
    for comm in comms:
        rank = comm.world.rank
        peers = {peer for peer, _ in comm.transport.sent}
        assert peers == (firsts - {rank} if rank in firsts else set())
    assert leftovers(comms) == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (3, 1), (4, 1), (5, 1), (6, 2)])
def test_no_interleaving_deadlocks(ranks, tp, seed):
    comms = open_local(ranks, tp=tp, schedule=SeededSchedule(seed))
    costs, *_ = run_local(comms, lambda comm: probe(comm, 100, 1000, repeats=2))
    assert_plausible(costs, ranks // tp)
    assert leftovers(comms) == []


@pytest.mark.parametrize("slow", [(0, 1), (1, 3), (2, 4)])
def test_a_slow_link_costs_most(slow):
    """Each way of the slow link takes 50 ms more; a round trip of the others far less than that."""
    comms = watched(5, slow)
    costs, *_ = run_local(comms, lambda comm: probe(comm, 1000, 100_000, repeats=2))
    pairs = list(itertools.combinations(range(5), 2))
    assert max(pairs, key=lambda pair: costs.round_trip[pair[0]][pair[1]]) == slow
    assert min(pairs, key=lambda pair: costs.bandwidth[pair[0]][pair[1]]) == slow
    a, b = slow
    assert costs.round_trip[a][b] >= 0.1
    assert costs.bandwidth[a][b] <= 2 * 100_000 / 0.1


def test_costs_stay_with_the_pair_they_were_measured_on():
    rows = [[(2, 3.0, 30.0), (1, 2.0, 20.0)], [(2, 4.0, 40.0)], []]
    inf = math.inf
    assert module.matrices(rows) == (
        [[0, 2, 3], [2, 0, 4], [3, 4, 0]],
        [[inf, 20, 30], [20, inf, 40], [30, 40, inf]],
    )


def test_too_many_instances_are_said_and_not_measured(caplog):
    (comm,) = watched(1)
    comm.world = replace(comm.world, nodes=(0,) * 513)
    assert probe(comm, 1000, 1000) is None
    assert "513 instances are too many" in caplog.text
    caplog.clear()
    comm.world = replace(comm.world, rank=3)
    assert probe(comm, 1000, 1000) is None
    assert caplog.text == ""
    assert comm.transport.sent == []


def test_a_missing_instance_is_named():
    def work(comm):
        if comm.world.rank != 1:
            probe(comm, 1000, 1000)

    with pytest.raises(StallError, match="waits for rank 1: probe of instance 1"):
        run_local(open_local(3, schedule=SeededSchedule(0)), work)


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_mpi_ranks_are_measured():
    ran = run_mpi(3, [SCRIPT])
    assert ran.returncode == 0, ran.stderr
    costs, *others = json.loads(ran.stdout)
    assert_plausible((costs["round_trip"], costs["bandwidth"]), 3)
    assert others == [None, None]
