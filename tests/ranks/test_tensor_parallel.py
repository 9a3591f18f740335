"""Instances of several ranks: the same tokens as on one rank, loans between them included, and
replicas that are the same."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from clusters import (
    BLOCK,
    demand_of,
    engine_of,
    greedy,
    options,
    run,
    run_cluster,
    shards,
    unconstrained,
)
from local_ranks import open_local, run_local
from seeded_schedule import SeededSchedule
from workloads import Letters, check_same, migrating_rows, migrations, sampled_rows

from hpc_distkv.comm.together import SetupError
from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.start.loading import load_model, open_model


@pytest.mark.parametrize(("ranks", "tp"), [(4, 1), (4, 2), (4, 4), (2, 2)])
def test_tokens_do_not_depend_on_how_ranks_form_instances(ranks, tp, tiny_model, whole):
    """With four lanes two of them hold the same KV head."""
    instances, blocks = ranks // tp, 16
    rows = greedy(demand_of(2, instances * blocks * BLOCK, random.Random(ranks)))
    outcome = run(tiny_model, rows, ranks, tp, num_blocks=blocks)
    assert outcome.ids == list(range(len(rows)))
    assert outcome.tokens == unconstrained(whole, rows)
    borrowed = sum(counters.blocks_borrowed for counters in outcome.counters)
    assert borrowed > 0 if instances > 1 else borrowed == 0


@pytest.mark.parametrize("seed", range(6))
def test_no_interleaving_of_lanes_deadlocks_or_leaves_a_message(seed, tiny_model, whole):
    rows = demand_of(1, 2 * 8 * BLOCK, random.Random(seed))
    outcome = run(tiny_model, rows, 4, 2, SeededSchedule(seed), num_blocks=8)
    assert outcome.tokens == unconstrained(whole, rows)


@pytest.mark.parametrize("policy", ["lend-greedy", "queue", "isolated"])
def test_other_policies_work_with_instances_of_two(policy, tiny_model, whole):
    rows = migrating_rows(5, ranks=1)
    outcome = run(tiny_model, rows, 4, 2, SeededSchedule(5), num_blocks=24, policy=policy)
    assert outcome.tokens == unconstrained(whole, rows)


def test_rows_migrate_between_instances_of_two(tiny_model, whole):
    moved = 0
    for seed in (1, 3, 5):
        rows = migrating_rows(seed)
        schedule = SeededSchedule(seed)
        outcome = run(tiny_model, rows, 6, 2, schedule, num_blocks=24, policy="migrate")
        assert outcome.tokens == unconstrained(whole, rows)
        moved += migrations(outcome)
    assert moved > 0


def test_ranks_that_do_not_divide_into_instances_are_an_error(tiny_model):
    settings = replace(options(num_blocks=8), tensor_parallel_size=2)
    with pytest.raises(OptionError, match="3 ranks cannot be cut into instances of 2"):
        load_model(open_local(3)[0], tiny_model, ModelConfig.from_dir(tiny_model), settings)


def test_weights_that_a_gpu_has_no_room_for_are_said_with_what_to_do(tiny_model, monkeypatch):
    def no_room(*_: object) -> Decoder:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr("hpc_distkv.start.loading.load_decoder", no_room)
    config = ModelConfig.from_dir(tiny_model)
    with pytest.raises(OptionError, match=r"no room for the weights: .*-size, now 1"):
        load_model(open_local(1)[0], tiny_model, config, options(num_blocks=8))


def test_a_shard_that_cannot_be_loaded_keeps_nobody_waiting(tiny_model, tmp_path, monkeypatch):
    """To connect the ranks of an instance takes a round of all ranks, as NCCL's start does."""
    settings = replace(options(num_blocks=8), tensor_parallel_size=2)
    comms = open_local(2, stall_timeout=5.0)
    for comm in comms:
        monkeypatch.setattr(comm.transport, "unite", lambda comm: comm.share("an id"))

    def work(comm: Comm) -> str:
        path = tmp_path if comm.world.rank else tiny_model
        with pytest.raises(SetupError) as said:
            open_model(comm, path, ModelConfig.from_dir(tiny_model), settings)
        return str(said.value)

    for said in run_local(comms, work):
        assert str(tmp_path) in said


def test_the_smallest_pool_of_an_instance_counts(tiny_model):
    models = shards(tiny_model, 4, 2)

    def blocks(comm: Comm) -> tuple[int, int]:
        settings = options(num_blocks=(20, 30, 50, 40)[comm.world.rank])
        engine = engine_of(comm, models[comm.world.rank], settings)
        return engine.config.num_blocks, engine.capacity_blocks

    assert run_local(open_local(4, tp=2), blocks) == [(20, 60), (20, 60), (40, 60), (40, 60)]


@pytest.mark.parametrize("policy", ["lend", "migrate"])
def test_sampling_fields_mean_the_same_with_instances_of_two(policy, tiny_model, whole):
    requests = sampled_rows(16, 60, random.Random(1))
    expected = run_cluster(whole, requests, 1, options(4000), decoder=Letters())
    models = shards(tiny_model, 4, 2)
    settings = options(24, policy=policy)
    found = run_cluster(models, requests, 4, settings, SeededSchedule(1), Letters(), tp=2)
    check_same(found, expected, requests)
