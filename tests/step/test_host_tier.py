"""Rows that have rBlocks in the host's memory get the tokens they get with plenty of memory."""

from __future__ import annotations

import inspect
import random
import sys
from pathlib import Path

import pytest
from clusters import BLOCK, VOCABULARY, Outcome, engine_of, options, run, run_cluster, unconstrained
from late_device import be_late
from local_ranks import open_local
from seeded_schedule import SeededSchedule
from workloads import crowd, pressed, tier

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.pace import Calibration
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.decide.swap import Swaps, may_spill
from hpc_distkv.errors import OptionError
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.family import FAMILIES
from hpc_distkv.model.weights import random_decoder

POLICIES = ("lend", "lend-greedy", "migrate", "queue", "isolated")


def total(outcome: Outcome, name: str) -> int:
    return sum(getattr(counters, name) for counters in outcome.counters)


@pytest.mark.parametrize("seed", range(10))
def test_tokens_do_not_depend_on_what_is_in_the_hosts_memory(model, seed):
    rng = random.Random(seed)
    ranks, blocks, host = 1 + seed % 2, rng.choice([3, 8, 24]), rng.choice([2, 10, 40])
    policy = POLICIES[seed % len(POLICIES)]
    pools = ranks * blocks if policy.startswith("lend") else blocks
    rows = crowd(rng, 9, (pools + host) * BLOCK)
    settings = tier(blocks, host, policy=policy, enable_prefix_caching=rng.random() < 0.7)
    schedule = SeededSchedule(seed) if seed % 3 == 0 else None
    outcome = run_cluster(model, rows, ranks, settings, schedule)
    assert outcome.tokens == unconstrained(model, rows)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_row_may_fill_all_pools_and_the_hosts_memory(model, ranks, policy):
    blocks, host = 16, 40
    pools = ranks * blocks if policy.startswith("lend") else blocks
    length = (pools + host) * BLOCK
    prompt = [random.Random(1).randrange(VOCABULARY) for _ in range(length - 11)]
    rows = [Request(0, pack_tokens(prompt), Sampling(12))]
    outcome = run_cluster(model, rows, ranks, tier(blocks, host, policy=policy))
    assert outcome.tokens == unconstrained(model, rows)
    assert outcome.counters[0].peak_host == host
    assert outcome.counters[0].host_time > 0
    assert (outcome.counters[0].peak_borrowed > 0) == (pools > blocks)


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_rows_are_not_computed_again(
    model,
    steady_pace,
    caching,
):
    rows = pressed()
    without = run_cluster(model, rows, 1, options(24, enable_prefix_caching=caching))
    outcome = run_cluster(model, rows, 1, tier(24, 60, enable_prefix_caching=caching))
    assert outcome.tokens == without.tokens == unconstrained(model, rows)
    assert total(outcome, "preemptions") > 0 < total(without, "preemptions")
    distinct = sum(row.prompt_len for row in rows)
    tails = BLOCK * total(outcome, "preemptions")
    assert total(without, "prompt_tokens") > distinct + tails
    assert distinct <= total(outcome, "prompt_tokens") <= distinct + tails


def test_copies_that_cost_more_than_to_compute_again_are_not_made(
    model,
    steady_pace,
    monkeypatch,
):
    monkeypatch.setattr("hpc_distkv.start.layout.copy_seconds", lambda *_: 1e3)
    outcome = run_cluster(model, pressed(), 1, tier(24, 60))
    assert total(outcome, "preemptions") > 0
    assert total(outcome, "blocks_to_host") == 0


def test_what_is_swapped_out_makes_room_for_a_row_that_cannot_go_on():
    config = EngineConfig(num_blocks=8, block_size=BLOCK, host_blocks=4, max_num_batched_tokens=16)
    rm = RManager(0, 8, host_blocks=4)
    scheduler = Scheduler(rm, config, Counters())
    swaps = Swaps()

    def running(number: int, length: int, blocks: int) -> TokenSequence:
        sequence = TokenSequence(Request(number, pack_tokens([1] * length), Sampling(9)), 0.0)
        rm.open(number)
        rm.grow(number, blocks)
        sequence.computed = blocks * BLOCK
        return sequence

    def moves() -> list[int]:
        out, home = swaps.take_plan()
        rm.swap.commit(out, home)
        return [move.block for move in out]

    young = running(9, 5 * BLOCK, 4)
    assert swaps.swap_out(scheduler, young)
    assert (moves(), swaps.commit(), rm.swap.free) == ([0, 1, 2, 3], [young], 0)
    rm.finish_swap_out(young.id)
    long = running(3, 12 * BLOCK, 8)
    assert may_spill(scheduler, long)
    scheduler.adopt(long)
    swaps.plan(scheduler, 3, lambda sequence: False)
    assert moves() == [0, 1, 2]
    assert (rm.swap.swapped, rm.swap.used, rm.slots.usable) == ({}, 3, 3)
    rm.check()


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_end_late_change_no_token(model, seed):
    rows = pressed() if seed % 2 else crowd(random.Random(seed), 8, 40 * BLOCK)
    ranks, schedule = 1 + seed // 2, SeededSchedule(seed)
    outcome = run_cluster(model, rows, ranks, tier(16, 24), schedule, prepare=be_late)
    assert outcome.tokens == unconstrained(model, rows)
    assert total(outcome, "blocks_to_host") > 0


@pytest.mark.parametrize("seed", range(3))
def test_peers_are_asked_for_memory_before_the_host(model, seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(VOCABULARY) for _ in range(36 * BLOCK)]
    rows = [Request(0, pack_tokens(tokens), Sampling(30))]
    outcome = run_cluster(model, rows, 2, tier(24, 40), SeededSchedule(seed))
    assert outcome.tokens == unconstrained(model, rows)
    assert total(outcome, "blocks_borrowed") > 0
    assert total(outcome, "blocks_to_host") == 0


def test_a_row_that_was_swapped_out_goes_on_though_steps_are_planned_ahead():
    instance = Instance(0, EngineConfig(num_blocks=20, block_size=4, host_blocks=20))
    scheduler = instance.scheduler
    scheduler.calibrate(Calibration(block_tokens=0.1))
    for number in range(2):
        request = Request(number, pack_tokens(range(12)), Sampling(max_tokens=20))
        scheduler.add(instance._sequence(request, 0.0))
    step = instance.plan()
    ends = instance.advance(step.scheduled)
    instance.learn(step.scheduled, ends, [5, 6], 1.0)
    scheduler._preempt(scheduler.running[1])
    instance.commit(instance.plan())
    assert list(instance.rm.swap.swapped) == [1]
    assert [(s.id, count) for s, count in instance.plan(ahead=True).scheduled] == [(0, 1)]
    assert scheduler.moving, "the next step is not planned ahead"
    step = instance.plan()
    assert len(step.from_host) == 3
    assert not scheduler.moving
    instance.commit(step)
    assert [s.id for s, _ in instance.plan(ahead=True).scheduled] == [0, 1]


def test_any_number_of_rows_comes_back_from_the_host_in_one_step():
    count, deepest = 200, sys.getrecursionlimit()
    config = EngineConfig(
        num_blocks=3 * count,
        block_size=4,
        max_num_seqs=count,
        max_num_batched_tokens=8 * count,
        host_blocks=count,
    )
    instance = Instance(0, config)
    scheduler, rm = instance.scheduler, instance.rm
    scheduler.calibrate(Calibration(block_tokens=0.1))
    for number in range(count):
        request = Request(number, pack_tokens([1] * 5), Sampling(max_tokens=2))
        scheduler.add(instance._sequence(request, 0.0))
    step = instance.plan()
    instance.learn(step.scheduled, instance.advance(step.scheduled), [5] * count, 1.0)
    for sequence in reversed(scheduler.running[:]):
        scheduler._preempt(sequence)
    instance.commit(instance.plan())
    assert len(rm.swap.swapped) == count
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        step = instance.plan()
    finally:
        sys.setrecursionlimit(deepest)
    assert (len(step.from_host), step.scheduled) == (count, [])
    assert len(scheduler.running) == count


def test_all_ranks_of_an_instance_swap_out_the_same(tiny_model: Path, whole):
    rows = crowd(random.Random(20), 6, 32 * BLOCK)
    lane_bytes = 3 * 2 * 1 * 16 * BLOCK * 4
    sizes = {"num_blocks": 16, "host_kv_memory": 16 * lane_bytes}
    outcome = run(tiny_model, rows, 4, 2, SeededSchedule(0), **sizes)
    assert outcome.tokens == unconstrained(whole, rows)
    for first in (0, 2):
        one, other = outcome.counters[first : first + 2]
        assert one.blocks_to_host == other.blocks_to_host
        assert one.blocks_from_host == other.blocks_from_host
    assert total(outcome, "blocks_to_host") > 0


@pytest.mark.parametrize("seed", range(2))
def test_windows_are_as_wide_after_a_preemption(seed):
    config = ModelConfig(
        family=FAMILIES["MistralForCausalLM"],
        num_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position=4096,
        windows=(140, 90),
    )
    windowed: Decoder = random_decoder(config, "float32")
    rows = pressed() if seed else crowd(random.Random(4), 8, 40 * BLOCK)
    outcome = run_cluster(windowed, rows, 1, tier(14, 40, max_num_batched_tokens=32))
    assert outcome.tokens == unconstrained(windowed, rows)
    assert total(outcome, "blocks_to_host") > 0


# -- a file in place of memory --------------------------------------------------------------------


def test_a_file_serves_as_well_and_never_has_a_name(model, tmp_path):
    rows = crowd(random.Random(3), 6, 40 * BLOCK)
    seen: list[Path] = []

    def look(comms: list) -> None:
        seen.extend(tmp_path.iterdir())

    settings = tier(16, 24, host_kv_path=str(tmp_path))
    outcome = run_cluster(model, rows, 1, settings, prepare=look)
    assert outcome.tokens == unconstrained(model, rows)
    assert total(outcome, "blocks_to_host") > 0
    assert seen == list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"host_kv_path": "."}, "--host-kv-path needs --host-kv-memory"),
        ({"host_kv_memory": 100}, "one rBlock takes 4096 bytes, but --host-kv-memory gives 100"),
        ({"host_kv_memory": 1 << 60}, "the node leaves .* to each of 1 ranks: give less"),
        ({"host_kv_memory": 1 << 20, "host_kv_path": "/none"}, r"/none: no file .* \(No such file"),
        ({"host_kv_memory": 1 << 60, "host_kv_path": "."}, "no file of .* can be made there"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_with_the_reason(model, others, words):
    (comm,) = open_local(1)
    with pytest.raises(OptionError, match=words):
        engine_of(comm, model, options(8, **others))
