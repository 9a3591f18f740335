"""A run that is stopped early: nothing is left behind, and a rerun goes on with the same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from clusters import (
    BLOCK,
    Countdown,
    Outcome,
    demand_of,
    greedy,
    options,
    run_cluster,
    shards,
    unconstrained,
)
from seeded_schedule import SeededSchedule
from workloads import Letters, check_same, migrating_rows, sampled_rows

from hpc_distkv.control.messages.requests import Request
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.interrupt import DRAIN, HALT, TERM_GRACE, Interrupt

Run = Callable[[list[Request], dict[int, Interrupt]], Outcome]


def run_to_the_end(rows: list[Request], run: Run, rank: int, rng: random.Random) -> Outcome:
    """Stop again and again, after a few reports of `rank`, and go on with what was left."""
    left = {row.id: row for row in rows}
    results, stops = [], 0
    while left:
        asked = Countdown(at=rng.randint(1, 6), grace=rng.choice([0, 0, 3, 40]))
        outcome = run(list(left.values()), {rank: asked} if stops < 6 else {})
        assert not set(outcome.ids) & {u.id for u in outcome.unfinished}
        for result in outcome.results.values():
            results.append(result)
            del left[result.id]
        for u in outcome.unfinished:
            assert u.output.startswith(left[u.id].output)
            left[u.id] = msgspec.structs.replace(left[u.id], output=u.output, logprobs=u.logprobs)
        stops += 1
    assert stops > 1
    return Outcome(results, [])


@pytest.mark.parametrize("policy", ["lend", "migrate", "queue"])
@pytest.mark.parametrize("seed", range(2))
def test_runs_that_are_stopped_anywhere_give_the_same_tokens(policy, seed, model):
    rng = random.Random(seed)
    rows = migrating_rows(seed) if policy != "lend" else demand_of(2, 3 * 24 * BLOCK, rng)

    def run(left: list[Request], interrupts: dict[int, Interrupt]) -> Outcome:
        schedule = SeededSchedule(rng.randrange(10**6))
        settings = options(24, policy=policy)
        return run_cluster(model, left, 3, settings, schedule, interrupts=interrupts)

    whole = run_to_the_end(rows, run, rng.randrange(3), rng)
    assert whole.ids == list(range(len(rows)))
    assert whole.tokens == unconstrained(model, rows)


@pytest.mark.parametrize("seed", range(2))
def test_penalties_stop_strings_and_logprobs_go_on_where_they_were(seed, model):
    rng = random.Random(seed)
    rows = sampled_rows(24, 40, rng)

    def run(left: list[Request], interrupts: dict[int, Interrupt]) -> Outcome:
        schedule = SeededSchedule(rng.randrange(10**6))
        return run_cluster(
            model, left, 2, options(20), schedule, decoder=Letters(), interrupts=interrupts
        )

    whole = run_to_the_end(rows, run, 0, rng)
    check_same(whole, run_cluster(model, rows, 1, options(400), decoder=Letters()), rows)


@pytest.mark.parametrize("rank", [0, 3])
def test_instances_of_several_ranks_leave_together_whichever_rank_is_asked(rank, tiny_model: Path):
    rng = random.Random(rank)
    rows = greedy(demand_of(1.5, 2 * 16 * BLOCK, rng))
    parts = shards(tiny_model, 4, 2)

    def run(left: list[Request], interrupts: dict[int, Interrupt]) -> Outcome:
        schedule = SeededSchedule(rng.randrange(10**6))
        return run_cluster(parts, left, 4, options(16), schedule, tp=2, interrupts=interrupts)

    whole = load_decoder(tiny_model, ModelConfig.from_dir(tiny_model))
    assert run_to_the_end(rows, run, rank, rng).tokens == unconstrained(whole, rows)


def test_nothing_is_begun_when_the_wish_was_there_before_the_first_report(model):
    rows = demand_of(1, 24 * BLOCK, random.Random(0))
    asked = Interrupt()
    asked.ask(1000.0)
    outcome = run_cluster(model, rows, 2, options(24), interrupts={1: asked})
    assert outcome.results == {}
    assert outcome.unfinished == []
    assert sum(counters.prompt_tokens for counters in outcome.counters) == 0


def test_what_runs_may_finish_within_the_grace(model):
    rows = demand_of(2, 2 * 24 * BLOCK, random.Random(1))
    asked = Countdown(at=4, grace=10**6)
    outcome = run_cluster(model, rows, 2, options(24), SeededSchedule(1), interrupts={1: asked})
    assert outcome.unfinished == []
    assert 0 < len(outcome.results) < len(rows)


def test_a_later_signal_brings_the_deadline_forward_and_never_back():
    now = 0.0
    asked = Interrupt(grace=60.0, clock=lambda: now)
    assert asked.wish == b""
    asked.ask(60.0)
    assert (asked.drain, asked.halt, asked.wish) == (True, False, DRAIN)
    now = 5.0
    asked.ask(TERM_GRACE)
    now = 6.0
    asked.ask(60.0)
    assert asked.wish == DRAIN
    now = 5.0 + TERM_GRACE
    assert asked.wish == HALT
