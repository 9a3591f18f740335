"""Ranks learn how far their clocks are apart, and rank 0 what all have to say."""

from __future__ import annotations

import time

import pytest
from local_ranks import leftovers, open_local, run_local
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.collective.clock import ROUND_TRIPS, measure_clock


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_offsets_are_found_within_their_error(ranks):
    comms = open_local(ranks, stall_timeout=20)
    ahead = [0.0, 1234.5, -77.25, 1e6, 3.0]
    found = run_local(
        comms,
        lambda comm: measure_clock(comm, lambda: time.perf_counter() + ahead[comm.world.rank]),
    )
    for rank, offset in enumerate(found):
        assert abs(offset.seconds - ahead[rank]) <= offset.error + 1e-9
    assert leftovers(comms) == []


def test_the_fastest_of_several_round_trips_counts():
    """A clock that jumps by the second at each reading: a round trip takes rank 0 one second, the
    fourth a tenth of one."""
    comms = open_local(2, stall_timeout=20, schedule=SeededSchedule(1))
    readings = [10.0 * trip + edge for trip in range(ROUND_TRIPS) for edge in (0.0, 1.0)]
    readings[7] = readings[6] + 0.1
    answers = [10.0 * trip + 500.9 for trip in range(ROUND_TRIPS)]
    answers[3] = readings[6] + 0.05 + 500.0
    clocks = {0: iter([*readings, 999.0]), 1: iter([*answers, 999.0])}
    _, found = run_local(comms, lambda comm: measure_clock(comm, clocks[comm.world.rank].__next__))
    assert found.seconds == pytest.approx(500.0)
    assert found.error == pytest.approx(0.05)


@pytest.mark.parametrize("seed", range(5))
def test_what_ranks_have_to_say_arrives_by_rank(seed):
    comms = open_local(4, schedule=SeededSchedule(seed))
    heard, *others = run_local(comms, lambda comm: comm.gather(b"%d" % comm.world.rank * 1000))
    assert heard == [b"%d" % rank * 1000 for rank in range(4)]
    assert others == [[], [], []]
    assert leftovers(comms) == []
