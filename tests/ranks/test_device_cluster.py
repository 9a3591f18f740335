"""Ranks on devices lend to each other, by way of the host or over a fabric that needs both sides at
once: tokens are those of one rank alone."""

from __future__ import annotations

import random

import pytest
from clusters import demand_of, options, request, run_cluster, shards, unconstrained
from deferred_copies import stage
from recorded_fabric import connect
from seeded_schedule import SeededSchedule


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prepare", [stage, connect])
def test_what_ends_late_changes_no_token(model, prepare, seed):
    rng = random.Random(seed)
    ranks, blocks = 3, 30
    rows = demand_of(1.5, blocks * 8, rng)
    rows.append(request(len(rows), 2 * blocks * 8, 12, rng))
    outcome = run_cluster(
        model, rows, ranks, options(blocks), schedule=SeededSchedule(seed), prepare=prepare
    )
    assert outcome.tokens == unconstrained(model, rows)
    assert sum(counters.blocks_borrowed for counters in outcome.counters) > blocks


@pytest.mark.parametrize("seed", range(4))
def test_hops_within_instances_and_loans_between_them_change_no_token(
    whole,
    tiny_model,
    seed,
):
    """Steps without loans do not wait for hops, steps with loans do; meetings come between."""
    fabrics = []
    rows = demand_of(1.5, 2 * 10 * 8, random.Random(seed))
    outcome = run_cluster(
        shards(tiny_model, 4, 2),
        rows,
        4,
        options(10),
        schedule=SeededSchedule(seed),
        tp=2,
        prepare=lambda comms: fabrics.append(connect(comms)),
    )
    assert outcome.tokens == unconstrained(whole, rows)
    assert sum(counters.blocks_borrowed for counters in outcome.counters) > 0
    assert (0, 1) in fabrics[0].hops
    assert set(fabrics[0].hops) <= {(0, 1), (2, 3)}
    assert {rank // 2 == peer // 2 for rank, peer, _ in fabrics[0].meetings} == {False, True}
