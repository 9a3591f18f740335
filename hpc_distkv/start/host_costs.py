"""Measures what rBlocks in the host's memory cost a rank, before its pools are used."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import cycle, islice

import torch

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, micro_attention
from hpc_distkv.comm.transport import Comm
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.step.sizes import PIECE_BLOCKS, QUERY_ROWS
from hpc_distkv.step.staging import wait_for

MEASURED_BLOCKS = 8
"""rBlocks that are copied there and back to measure how long that takes, ..."""
MEASUREMENTS = 3
"""... so many times; the median counts."""
SHORTEST_CONTEXT, LONGER = 64, 4
"""Tokens that they attend to at first, and the factor by which these grow ..."""
LONG_ENOUGH = 0.1
"""... until so many seconds are spent: half a second at most, unless the first takes longer. The
context with the least for a token counts: in short ones not all threads have work, and to wake them
may take longer than what they do."""


def copy_seconds(comm: Comm, pool: BlockPool, host_pool: BlockPool) -> float:
    """Seconds to copy one rBlock to the host's memory and back."""
    count = min(MEASURED_BLOCKS, pool.num_blocks, host_pool.num_blocks)
    ours, hosts = _rblocks(pool, count), _rblocks(host_pool, count)

    def there_and_back() -> None:
        for sources, targets in ((ours, hosts), (hosts, ours)):
            wait_for(comm, [comm.device.copy_beside(sources, targets)])

    return _median_seconds(there_and_back) / count


def staged_from(
    comm: Comm, pool: BlockPool, host_pool: BlockPool, heads: int, spec: AttentionSpec
) -> float:
    """Query rows that have to attend to the same rBlocks in the host's memory for a copy of these,
    layer by layer, to take less time than the host's processor takes in place.

    In place costs rows × tokens × `attend_seconds`, a copy tokens × `token_copy_seconds`, whatever
    the rows: the device's own attention is so much faster that it is left out. On a rank without a
    device of its own a copy would only move what stays as far away: never. `heads`: query heads of
    the shard.
    """
    if comm.device.place.type == "cpu":
        return math.inf
    return token_copy_seconds(comm, pool, host_pool) / attend_seconds(host_pool, heads, spec)


def token_copy_seconds(comm: Comm, pool: BlockPool, host_pool: BlockPool) -> float:
    """Seconds in which the K and V of one token of one layer come from the host's memory, copied
    as `Staging` does: rBlock by rBlock, a piece at once."""
    count = min(PIECE_BLOCKS, pool.num_blocks, host_pool.num_blocks)
    sources = [rblock[0] for rblock in _rblocks(host_pool, count)]
    targets = [rblock[0] for rblock in _rblocks(pool, count)]
    seconds = _median_seconds(lambda: wait_for(comm, [comm.device.copy_beside(sources, targets)]))
    return seconds / (count * pool.block_size)


def attend_seconds(host_pool: BlockPool, heads: int, spec: AttentionSpec) -> float:
    """Seconds in which the host's processor attends in place, for one query row and one KV token of
    one layer."""
    count = min(MEASURED_BLOCKS, host_pool.num_blocks)
    for rblock in _rblocks(host_pool, count):
        rblock[0].zero_()  # numbers that are none, or next to none, may take longer
    cache, size = host_pool.layer(0), host_pool.block_size
    q = torch.zeros((QUERY_ROWS, heads, cache[0].shape[3]), dtype=host_pool.dtype)
    spec = AttentionSpec(spec.scale, softcap=spec.softcap, slopes=spec.slopes)

    def attention(tokens: int) -> Callable[[], object]:
        blocks = list(islice(cycle(range(count)), tokens // size))
        row = PagedRow(QUERY_ROWS, tokens, blocks, range(0, tokens, size), tokens)
        batch = PagedBatch.build([row])
        return lambda: micro_attention(q, *cache, batch, spec, causal=False)

    tokens = -(-SHORTEST_CONTEXT // size) * size
    attention(tokens)()  # what is compiled at the first call is not in it
    spent, least = 0.0, math.inf
    while spent < LONG_ENOUGH:
        seconds = _seconds(attention(tokens))
        spent, least = spent + seconds, min(least, seconds / tokens)
        tokens *= LONGER
    return least / QUERY_ROWS


def _rblocks(pool: BlockPool, count: int) -> list[torch.Tensor]:
    return [pool.rblock(slot) for slot in range(count)]


def _median_seconds(call: Callable[[], object]) -> float:
    return sorted(_seconds(call) for _ in range(MEASUREMENTS))[MEASUREMENTS // 2]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
