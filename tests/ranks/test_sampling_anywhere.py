"""A row with any sampling fields gets the same tokens, the same end and the same logprobs in any
batch, on any number of ranks, preempted, handed over or neither."""

from __future__ import annotations

import random

import pytest
from clusters import BLOCK, Outcome, options, run_cluster
from seeded_schedule import SeededSchedule
from workloads import Letters, check_same, sampled_rows

from hpc_distkv.control.messages.requests import Request
from hpc_distkv.model.decoder import Decoder


def alone(model: Decoder, requests: list[Request]) -> Outcome:
    """Row by row, each in a batch of its own."""
    return run_cluster(model, requests, 1, options(400, max_num_seqs=1), decoder=Letters())


def test_any_batch_any_ranks_and_preemption(model):
    preemptions = matches = 0
    for seed in range(4):
        requests = sampled_rows(24, 40, random.Random(seed))
        expected = alone(model, requests)
        matches += sum(result.text_end is not None for result in expected.results.values())
        for ranks, blocks in ((1, 4000), (1, 13), (3, 13)):
            outcome = run_cluster(model, requests, ranks, options(blocks), decoder=Letters())
            check_same(outcome, expected, requests)
            preemptions += sum(counters.preemptions for counters in outcome.counters)
    assert preemptions > 0
    assert matches > 4


def test_rows_that_are_handed_over(model, steady_pace):
    migrations = 0
    for seed in range(6):
        requests = sampled_rows(30, 60, random.Random(seed))
        expected = run_cluster(model, requests, 1, options(4000), decoder=Letters())
        small, schedule = options(20, policy="migrate"), SeededSchedule(seed)
        outcome = run_cluster(model, requests, 3, small, schedule, decoder=Letters())
        check_same(outcome, expected, requests)
        migrations += sum(counters.migrations for counters in outcome.counters)
    assert migrations > 0


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_messages(model, seed):
    requests = sampled_rows(20, 8 * BLOCK, random.Random(seed))
    schedule = SeededSchedule(seed)
    outcome = run_cluster(model, requests, 3, options(14), schedule, decoder=Letters())
    check_same(outcome, alone(model, requests), requests)
