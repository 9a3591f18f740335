"""The items of a GPU launch cover every pair of a query and a key that it sees exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from attention_oracle import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_distkv.attention.triton import tuning
from hpc_distkv.attention.triton.worklist import KeyIndex

H100 = tuning.Processors(132, 232_448)
LLAMA = tuning.Shape(group=4, kv_heads=8, dim=128, itemsize=2)


def seen(case: Case) -> dict[int, set[int]]:
    """Query → the indices of its row's keys that it sees."""
    found, query, size = {}, 0, case.k_cache.shape[2]
    for row in case.rows:
        for nth in range(row.queries):
            at = row.query_position + nth
            first = at - case.spec.window + 1 if case.spec.window else -np.inf
            last = at if case.causal else np.inf
            positions = [row.first_token[key // size] + key % size for key in range(row.kv_len)]
            found[query] = {key for key, p in enumerate(positions) if first <= p <= last}
            query += 1
    return found


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    queries=st.integers(1, 16),
    chunk=st.integers(1, 100),
    step=st.sampled_from([1, 16, 64]),
    reverse=st.booleans(),
)
def test_every_query_gets_all_its_keys_once(case, queries, chunk, step, reverse):
    if reverse:  # the order of rBlocks that are all full is free
        size = case.k_cache.shape[2]
        case.rows = [
            row._replace(first_token=row.first_token[::-1], kv_len=len(row.blocks) * size)
            for row in case.rows
        ]
    index = KeyIndex(case.batch, case.k_cache.shape[2])
    rows = np.flatnonzero(index.counts)
    tiles = index.tiles(rows, queries, causal=case.causal, window=case.spec.window)
    items, merges, partials = tiles.cut(chunk, step, 5)
    want = seen(case)
    got: dict[int, list[int]] = {query: [] for query in want}
    slots: dict[int, list[int]] = {query: [] for query in want}
    for first, count, _, _, begin, full, end, slot in items.tolist():
        assert count <= queries
        for nth in range(count):
            mine = want[first + nth]
            read = set(range(begin, end))
            assert set(range(begin, full)) <= mine
            if tiles.exact:
                assert read <= mine
            got[first + nth] += read & mine
            slots[first + nth] += [] if slot < 0 else [slot + nth]
    assert {query: sorted(keys) for query, keys in got.items()} == {
        query: sorted(keys) for query, keys in want.items()
    }
    listed = {q: [s + i * step for i in range(n)] for q, s, step, n in merges.tolist()}
    assert listed == {query: sorted(mine) for query, mine in slots.items() if mine}
    every = sorted(slot for mine in slots.values() for slot in mine)
    assert every == list(range(5, partials))


@pytest.mark.parametrize(
    "lengths",
    [
        [16_384],
        [1_000_000],
        [16_384] * 3,
        [16_384] * 40,
        [16_384] * 256,
        [4_096] * 35,
        [1_000_000] + [1_000] * 255,
        list(range(1_000, 65_000, 1_000)),
    ],
    ids=lambda lengths: f"{len(lengths)} of {lengths[0]}",
)
def test_programs_of_a_decode_finish_at_about_the_same_time(lengths):
    kernel = tuning.decode_kernel(LLAMA, H100)
    lengths = np.array(lengths)
    chunk = tuning.chunk(lengths, LLAMA.kv_heads, kernel, H100)
    items = [
        min(chunk, length - start) for length in lengths for start in range(0, length, chunk)
    ] * LLAMA.kv_heads
    ideal = lengths.sum() * LLAMA.kv_heads / (kernel.resident * H100.count)
    assert finish(items, kernel.resident * H100.count, kernel.alone) <= 1.25 * ideal


def finish(items: list[int], places: int, alone: float) -> float:
    """When the last of these programs ends, if those that run share the bandwidth of all places
    evenly and none is more than `alone` times as fast as one of `places`."""
    waiting, running, now = sorted(items), np.zeros(0), 0.0
    while waiting or len(running):
        free = places - len(running)
        running = np.append(running, [waiting.pop() for _ in range(min(free, len(waiting)))])
        rate, step = min(alone, places / len(running)), running.min()
        now += step / rate
        running = running[running > step] - step
    return now


def test_rows_that_fill_the_device_are_not_cut():
    kernel = tuning.prefill_kernel(LLAMA, H100)
    triangle = np.arange(32, 8193, 32)
    assert tuning.chunk(triangle, LLAMA.kv_heads, kernel, H100) >= 8192 // 2
    assert tuning.chunk(np.full(256, 1024), 8, tuning.decode_kernel(LLAMA, H100), H100) >= 1024


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])
def test_tiles_fit_the_shared_memory_of_small_and_large_gpus(dim, itemsize, group, shared):
    shape = tuning.Shape(group, 1, dim, itemsize)
    device = tuning.Processors(100, shared)
    for choose in (tuning.decode_kernel, tuning.prefill_kernel):
        kernel = choose(shape, device)
        assert kernel.lines >= group
        queries = kernel.lines * shape.width * itemsize
        tiles = (kernel.stages - 1) * kernel.keys * 2 * shape.width * itemsize
        assert kernel.resident * (queries + tiles) <= shared
