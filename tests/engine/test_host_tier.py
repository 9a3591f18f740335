"""Rows that have rBlocks in the host's memory get the tokens that they get with plenty of memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from clusters import Outcome, run_cluster
from deferred_copies import late
from test_cluster import BLOCK, VOCABULARY, model, options, unconstrained  # noqa: F401
from test_tensor_parallel import run, whole  # noqa: F401

from hpc_distkv.comm.local import open_local
from hpc_distkv.comm.schedule import SeededSchedule
from hpc_distkv.control.messages import Request, Sampling, pack_tokens
from hpc_distkv.engine.config import OptionError
from hpc_distkv.engine.rank import EngineOptions, RankEngine
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.family import FAMILIES
from hpc_distkv.model.weights import random_decoder

BLOCK_BYTES = 2 * 2 * 2 * 16 * BLOCK * 4
"""Of `model`: layers, K and V, KV heads, head dimension."""
STOPS = tuple(range(12))
POLICIES = ("lend", "lend-greedy", "migrate", "queue", "isolated")


def tier(blocks: int, host_blocks: int, **others: object) -> EngineOptions:
    return options(blocks, host_kv_memory=host_blocks * BLOCK_BYTES, **others)


def total(outcome: Outcome, name: str) -> int:
    return sum(getattr(counters, name) for counters in outcome.counters)


def crowd(rng: random.Random, count: int, capacity: int) -> list[Request]:
    """Rows of which a few need most of the capacity (tokens), some share a document, and some stop
    early, so that others last longer than was expected."""
    document = [rng.randrange(VOCABULARY) for _ in range(capacity)]
    rows = []
    for number in range(count):
        longest = capacity - 1 if rng.random() < 0.2 else min(60, capacity - 1)
        length = rng.randint(1, longest)
        tokens = [rng.randrange(VOCABULARY) for _ in range(length)]
        if rng.random() < 0.4:
            shared = rng.randint(0, length)
            tokens[:shared] = document[:shared]
        output = min(rng.randint(1, 60), capacity - length + 1)
        stops = STOPS if rng.random() < 0.6 else ()
        sampling = Sampling(output, rng.choice([0.0, 1.0]), seed=number, stop_token_ids=stops)
        rows.append(Request(number, pack_tokens(tokens), sampling))
    return rows


def pressed() -> list[Request]:
    """The first rows end early, so that more of the others begin than there is room for."""
    rng, rows = random.Random(5), []
    for number in range(24):
        tokens = [rng.randrange(VOCABULARY) for _ in range(40)]
        early = number < 8
        sampling = Sampling(60, 1.0 if early else 0.0, seed=number, stop_token_ids=STOPS * early)
        rows.append(Request(number, pack_tokens(tokens), sampling))
    return rows


@pytest.mark.parametrize("seed", range(16))
def test_tokens_do_not_depend_on_what_is_in_the_hosts_memory(model, seed):  # noqa: F811
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
def test_one_row_may_fill_all_pools_and_the_hosts_memory(model, ranks, policy):  # noqa: F811
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
def test_rows_that_give_way_are_not_computed_again(
    model,  # noqa: F811
    steady_pace,
    caching,
):
    rows = pressed()
    without = run_cluster(model, rows, 1, options(30, enable_prefix_caching=caching))
    outcome = run_cluster(model, rows, 1, tier(30, 60, enable_prefix_caching=caching))
    assert outcome.tokens == without.tokens == unconstrained(model, rows)
    assert total(outcome, "preemptions") > 0 < total(without, "preemptions")
    distinct = sum(row.prompt_len for row in rows)
    tails = BLOCK * total(outcome, "preemptions")
    assert total(without, "prompt_tokens") > distinct + tails
    assert distinct <= total(outcome, "prompt_tokens") <= distinct + tails


def test_copies_that_cost_more_than_to_compute_again_are_not_made(
    model,  # noqa: F811
    steady_pace,
    monkeypatch,
):
    monkeypatch.setattr("hpc_distkv.engine.rank.copy_seconds", lambda *_: 1e3)
    outcome = run_cluster(model, pressed(), 1, tier(30, 60))
    assert total(outcome, "preemptions") > 0
    assert total(outcome, "blocks_to_host") == 0


def test_rows_make_room_in_the_hosts_memory_for_one_that_cannot_go_on(model):  # noqa: F811
    """The long row comes when the host's memory is full of what younger and older ones put aside,
    or fills it while they wait."""
    rng = random.Random(2)
    rows = pressed()
    prompt = [rng.randrange(VOCABULARY) for _ in range(44 * BLOCK)]
    rows.insert(12, Request(12, pack_tokens(prompt), Sampling(20)))
    rows = [Request(n, row.prompt, row.sampling) for n, row in enumerate(rows)]
    outcome = run_cluster(model, rows, 1, tier(30, 17))
    assert outcome.tokens == unconstrained(model, rows)
    assert outcome.counters[0].peak_host == 17


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_end_late_change_no_token(model, seed):  # noqa: F811
    rows = crowd(random.Random(seed), 10, 40 * BLOCK)
    settings = tier(16, 24, policy=("queue", "lend")[seed % 2])
    ranks, schedule = 1 + seed % 2, SeededSchedule(seed)
    outcome = run_cluster(model, rows, ranks, settings, schedule, prepare=late)
    assert outcome.tokens == unconstrained(model, rows)
    assert total(outcome, "blocks_to_host") > 0 < total(outcome, "blocks_from_host")


@pytest.mark.parametrize("seed", range(2))
def test_all_ranks_of_an_instance_put_the_same_aside(tiny_model: Path, whole, seed):  # noqa: F811
    rows = crowd(random.Random(20 + seed), 8, 32 * BLOCK)
    lane_bytes = 3 * 2 * 1 * 16 * BLOCK * 4
    sizes = {"num_blocks": 16, "host_kv_memory": 16 * lane_bytes}
    outcome = run(tiny_model, rows, 4, 2, SeededSchedule(seed), **sizes)
    assert outcome.tokens == unconstrained(whole, rows)
    for first in (0, 2):
        one, other = outcome.counters[first : first + 2]
        assert one.blocks_to_host == other.blocks_to_host
        assert one.blocks_from_host == other.blocks_from_host
    assert total(outcome, "blocks_to_host") > 0


@pytest.mark.parametrize("seed", range(4))
def test_windows_are_as_wide_after_a_row_gave_way(seed):
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
        windows=(70, 50),
    )
    windowed: Decoder = random_decoder(config, "float32")
    rows = pressed() if seed % 2 else crowd(random.Random(seed), 10, 24 * BLOCK)
    outcome = run_cluster(windowed, rows, 1, tier(16, 40, max_num_batched_tokens=32))
    assert outcome.tokens == unconstrained(windowed, rows)
    assert total(outcome, "blocks_to_host") > 0


# -- a file in place of memory --------------------------------------------------------------------


def test_a_file_serves_as_well_and_never_has_a_name(model, tmp_path):  # noqa: F811
    rows = crowd(random.Random(3), 10, 40 * BLOCK)
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
        ({"host_kv_memory": 1 << 60}, "each of 1 ranks on this node, which has"),
        ({"host_kv_memory": 1 << 20, "host_kv_path": "/none"}, "/none: .* No such file"),
        ({"host_kv_memory": 1 << 60, "host_kv_path": "."}, "no file of .* can be made there"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_with_the_reason(model, others, words):  # noqa: F811
    (comm,) = open_local(1)
    with pytest.raises(OptionError, match=words):
        RankEngine(comm, model, options(8, **others))
