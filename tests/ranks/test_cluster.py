"""Whole clusters over the `local` transport: a row's tokens do not depend on ranks, pools,
preemption or on the order in which messages arrive, and everything ends."""

from __future__ import annotations

import random
import time

import pytest
from clusters import (
    BLOCK,
    demand_of,
    engine_of,
    options,
    request,
    run_cluster,
    tiny_decoder,
    unconstrained,
)
from local_ranks import open_local, run_local
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.transport import Comm
from hpc_distkv.model.decoder import Decoder


@pytest.mark.parametrize("seed", range(50))
def test_three_times_the_memory_of_four_ranks_always_finishes_with_the_same_tokens(model, seed):
    rng = random.Random(seed)
    rows = demand_of(3, 4 * 24 * BLOCK, rng)
    outcome = run_cluster(model, rows, 4, options(24))
    assert outcome.ids == list(range(len(rows)))
    assert outcome.tokens == unconstrained(model, rows)
    assert sum(counters.refused_grants for counters in outcome.counters) == 0


@pytest.mark.parametrize("seed", range(40))
def test_no_interleaving_deadlocks_or_leaves_a_message(model, seed):
    """Three ranks in one thread at a time, switched at every call into comm by a seed; messages
    are delivered, and their memory read, as late as MPI might."""
    rng = random.Random(seed)
    rows = demand_of(1.5, 3 * 8 * BLOCK, rng)
    outcome = run_cluster(model, rows, 3, options(8), SeededSchedule(seed))
    assert outcome.ids == list(range(len(rows)))
    assert outcome.tokens == unconstrained(model, rows)


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 16), (3, 40), (4, 24), (3, 1)])
def test_one_row_may_fill_the_whole_cluster(model, ranks, blocks):
    capacity = ranks * blocks * BLOCK
    rows = [request(0, capacity - 5, 6, random.Random(1))]
    outcome = run_cluster(model, rows, ranks, options(blocks))
    assert outcome.tokens == unconstrained(model, rows)
    assert outcome.counters[0].peak_borrowed == (ranks - 1) * blocks


def test_nothing_is_lent_when_lending_is_off(model):
    rows = demand_of(2, 12 * BLOCK, random.Random(3))
    outcome = run_cluster(model, rows, 3, options(30, policy="queue"))
    assert outcome.tokens == unconstrained(model, rows)
    assert all(counters.blocks_borrowed == 0 for counters in outcome.counters)


@pytest.mark.parametrize("seed", range(5))
def test_an_even_load_that_fits_borrows_nothing(model, steady_pace, seed):
    rng = random.Random(5)
    rows = [request(i, 30, 20, rng) for i in range(24)]
    outcome = run_cluster(model, rows, 3, options(200), SeededSchedule(seed))
    assert all(counters.blocks_borrowed == 0 for counters in outcome.counters)
    assert min(counters.generated_tokens for counters in outcome.counters) > 0


def test_what_is_promised_to_others_does_not_keep_own_rows_waiting(model):
    rows = [request(i, 60, 40, random.Random(i)) for i in range(16)]
    steps = {
        policy: max(
            counters.steps
            for counters in run_cluster(model, rows, 2, options(3000, policy=policy)).counters
        )
        for policy in ("lend", "queue")
    }
    assert steps["lend"] < 2 * steps["queue"]


class Slow:
    """The model of one rank that needs long for every step."""

    def __init__(self, model: Decoder, delay: float) -> None:
        self._model, self._delay = model, delay
        self.config, self.dtype = model.config, model.dtype
        self.attention, self.needs_lengths = model.attention, model.needs_lengths
        self.lanes, self.capturable = model.lanes, model.capturable

    def hidden(self, *step):
        time.sleep(self._delay)
        return self._model.hidden(*step)

    def logits(self, rows):
        return self._model.logits(rows)


def test_a_slow_rank_does_not_hold_back_ranks_it_has_no_loans_with(model):
    """Rank 2 sleeps in every step; ranks 0 and 1 must step many times per step of rank 2, also
    when they have loans with each other."""
    rng = random.Random(2)
    # Assigned by load: the first three rows go to ranks 0, 1, 2; rank 0's needs rank 1's memory.
    rows = [request(0, 20 * BLOCK, 100, rng), request(1, 30, 250, rng), request(2, 100, 8, rng)]
    models = {0: model, 1: model, 2: Slow(model, 0.25)}
    outcome = run_cluster(models, rows, 3, options(48, max_num_batched_tokens=16))
    assert outcome.tokens == unconstrained(model, rows)
    fast, slow = outcome.counters[1], outcome.counters[2]
    assert slow.steps >= 8
    assert fast.steps > 5 * slow.steps


def test_no_rank_lends_more_than_its_cap(model):
    rows = [request(0, (16 + 2 * 5) * BLOCK - 5, 6, random.Random(1))]
    outcome = run_cluster(model, rows, 3, options(16, lend_cap=5))
    assert outcome.tokens == unconstrained(model, rows)
    assert outcome.counters[0].peak_borrowed == 2 * 5


def test_a_row_may_be_as_long_as_the_smallest_home_can_make_it():
    """What a row may use is its home's pool and what the others lend; any rank may be its home."""
    sizes = [(16, None), (4, 3), (10, 20)]
    comms = open_local(3)

    def capacity(comm: Comm) -> int:
        blocks, cap = sizes[comm.world.rank]
        engine = engine_of(comm, tiny_decoder(), options(blocks, lend_cap=cap))
        return engine.capacity_blocks

    assert run_local(comms, capacity) == [min(16 + 3 + 10, 4 + 16 + 10, 10 + 16 + 3)] * 3
