"""Policies under churn: whole clusters whose rows come and go."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from clusters import (
    BLOCK,
    Outcome,
    demand_of,
    options,
    request,
    run_cluster,
    unconstrained,
)
from seeded_schedule import SeededSchedule

from hpc_distkv.control.messages.requests import Request
from hpc_distkv.control.policy import POLICIES

BLOCKS = 24
RANKS = 3


def long_and_short(seed: int) -> list[Request]:
    """Long rows that decode for long, and short ones that take the room between them away and give
    it back."""
    rng = random.Random(seed)
    pool = BLOCKS * BLOCK
    sizes: list[tuple[int, int]] = []
    for _ in range(3):
        sizes.append((rng.randint(pool // 2, pool * 3 // 4), rng.randint(80, 140)))
        sizes += [(rng.randint(10, 60), rng.randint(5, 30)) for _ in range(rng.randint(4, 8))]
    return [request(number, *size, rng) for number, size in enumerate(sizes)]


def total(outcomes: list[Outcome], name: str) -> int:
    return sum(getattr(counters, name) for o in outcomes for counters in o.counters)


def test_dgfm_lowers_the_share_of_rblocks_that_live_elsewhere(model, steady_pace):
    """The mean over steps and over several runs; the tokens are the same."""
    shares = {}
    for dgfm in (True, False):
        policy = replace(POLICIES["lend"], dgfm=dgfm, planner=False)
        outcomes = []
        for seed in range(5):
            rows = long_and_short(seed)
            settings = options(BLOCKS, policy=policy, move_budget=8 * BLOCK)
            outcomes.append(run_cluster(model, rows, RANKS, settings, SeededSchedule(seed)))
            assert outcomes[-1].tokens == unconstrained(model, rows)
        assert (total(outcomes, "blocks_returned") > 0) == dgfm
        held = total(outcomes, "held_block_steps")
        shares[dgfm] = total(outcomes, "remote_block_steps") / held
    assert 0 < shares[True] < shares[False]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["isolated", "queue", "lend-greedy"])
def test_every_policy_ends_with_the_same_tokens(model, policy, seed):
    reach = RANKS if policy == "lend-greedy" else 1
    rows = demand_of(3 / reach * RANKS, reach * BLOCKS * BLOCK, random.Random(seed))
    outcome = run_cluster(model, rows, RANKS, options(BLOCKS, policy=policy))
    assert outcome.ids == list(range(len(rows)))
    assert outcome.tokens == unconstrained(model, rows)
    assert (total([outcome], "blocks_borrowed") > 0) == (policy == "lend-greedy")
    assert total([outcome], "refused_grants") == total([outcome], "migrations") == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0, 64])
def test_debts_that_come_home_on_the_way_change_no_interleavings_tokens(model, budget, seed):
    rows = long_and_short(seed)
    policy = replace(POLICIES["lend"], planner=seed % 2 == 0)
    settings = options(BLOCKS, policy=policy, move_budget=budget)
    outcome = run_cluster(model, rows, RANKS, settings, SeededSchedule(100 + seed))
    assert outcome.tokens == unconstrained(model, rows)
    assert (total([outcome], "blocks_returned") > 0) <= (budget > 0)
