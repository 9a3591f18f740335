"""The attention kernels alone: bytes per second of decodes, operations per second of prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.attention import AttentionSpec, PagedBatch, micro_attention
from hpc_distkv.model.config import dtype_name

LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
BATCHES = (1, 4, 16, 64, 256)
PROMPTS = ((8, 1024, 1024), (1, 8192, 8192), (1, 32768, 32768), (1, 2048, 131_072))
"""(rows, queries, tokens)."""
MOST_TOKENS = 1 << 22
COPIED_BYTES = 1 << 30
SAMPLED_QUERIES = 8
REPEATS = 7


@dataclass(frozen=True)
class Heads:
    """The shape of a model's attention; those of Llama 3 8B unless given."""

    query: int = 32
    kv: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def token_bytes(self) -> int:
        """K and V of one token and layer."""
        return 2 * self.kv * self.dim * self.dtype.itemsize


def kernel_figures(
    device: torch.device,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    prompts: Sequence[tuple[int, int, int]] = PROMPTS,
    most_tokens: int = MOST_TOKENS,
    block_size: int = 32,
    heads: Heads | None = None,
) -> dict[str, Any]:
    """Decode MicroAttention for every batch and length of at most `most_tokens` tokens together, as
    a part of the speed of a large copy, then prompts; both beside torch's attention over contiguous
    K and V, and compared with float64 for a few queries. Caches are read from memory: calls that
    follow each other read different rBlocks."""
    heads = heads or Heads()
    torch.manual_seed(0)
    copied = copy_speed(device, COPIED_BYTES if device.type == "cuda" else 1 << 24)
    longest = max((rows * tokens for rows, _, tokens in prompts), default=0)
    tokens = max(
        most_tokens, longest + block_size * max((rows for rows, _, _ in prompts), default=0)
    )
    bench = KernelBench(device, heads, block_size, tokens)
    decodes = [
        bench.decode(batch, length, copied)
        for length in lengths
        for batch in batches
        if batch * length <= most_tokens
    ]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "block_size": block_size,
        "query_heads": heads.query,
        "kv_heads": heads.kv,
        "head_dim": heads.dim,
        "dtype": dtype_name(heads.dtype),
        "copy_bytes_per_second": copied,
        "decode": decodes,
        "prompt": [bench.prompt(*prompt) for prompt in prompts],
    }


def copy_speed(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes within the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    # Not as a graph: copies that are replayed are a fifth slower.
    return 2 * size / (_gpu_seconds(copy, device) if device.type == "cuda" else _seconds(copy))


class KernelBench:
    """One pool of rBlocks of random numbers, and timed calls over parts of it."""

    def __init__(self, device: torch.device, heads: Heads, block_size: int, tokens: int) -> None:
        self._device, self._heads, self._block_size = device, heads, block_size
        blocks = -(-tokens // block_size)
        shape = (blocks, 2, heads.kv, block_size, heads.dim)
        self._pool = torch.empty(shape, dtype=heads.dtype, device=device)
        self._pool.normal_()
        self._spec = AttentionSpec(heads.dim**-0.5)
        self._random = np.random.default_rng(0)

    def decode(self, rows: int, tokens: int, copied: float) -> dict[str, Any]:
        """One query of each of `rows` rows of `tokens` tokens."""
        size = rows * tokens * self._heads.token_bytes
        batches = self._batches(rows, 1, tokens, -(-COPIED_BYTES // size))
        took, errors = self._measure(rows, batches)
        other = self._torch(rows, 1, tokens, False)
        return {
            "batch": rows,
            "tokens": tokens,
            "seconds": took,
            "bytes_per_second": size / took,
            "of_copy": size / took / copied,
            **errors,
            "torch_seconds": other,
            "over_torch": None if other is None else other / took,
        }

    def prompt(self, rows: int, queries: int, tokens: int) -> dict[str, Any]:
        """The last `queries` of `tokens` tokens of each row, causal."""
        took, errors = self._measure(queries * rows, self._batches(rows, queries, tokens, 2))
        pairs = rows * queries * (2 * tokens - queries + 1) / 2
        operations = 4 * self._heads.query * self._heads.dim * pairs
        other = self._torch(rows, queries, tokens, True) if queries == tokens else None
        return {
            "rows": rows,
            "queries": queries,
            "tokens": tokens,
            "seconds": took,
            "flop_per_second": operations / took,
            **errors,
            "torch_flop_per_second": None if other is None else operations / other,
            "over_torch": None if other is None else other / took,
        }

    def _batches(self, rows: int, queries: int, tokens: int, wanted: int) -> list[PagedBatch]:
        """Batches over different rBlocks, as many as there are but not more than 16."""
        per_row = -(-tokens // self._block_size)
        count = max(1, min(wanted, 16, len(self._pool) // (rows * per_row)))
        order = self._random.permutation(len(self._pool))[: count * rows * per_row]
        first = np.tile(np.arange(per_row) * self._block_size, rows)
        return [
            PagedBatch(
                query_start=_int32(np.arange(rows + 1) * queries),
                query_position=_int32(np.full(rows, tokens - queries)),
                block_start=_int32(np.arange(rows + 1) * per_row),
                blocks=_int32(part),
                first_token=_int32(first),
                kv_len=_int32(np.full(rows, tokens)),
            )
            for part in order.reshape(count, -1)
        ]

    def _measure(self, queries: int, batches: list[PagedBatch]) -> tuple[float, dict[str, float]]:
        heads, device = self._heads, self._device
        q = torch.randn(queries, heads.query, heads.dim, device=device).to(heads.dtype)
        out, lse = torch.empty(q.shape, device=device), torch.empty(q.shape[:2], device=device)

        def call(batch: PagedBatch) -> None:
            k_cache, v_cache = self._pool[:, 0], self._pool[:, 1]
            micro_attention(q, k_cache, v_cache, batch, self._spec, causal=True, out=out, lse=lse)

        took = seconds([partial(call, batch) for batch in batches], device)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        call(batches[0])
        return took, self._errors(q, out, lse, batches[0])

    def _errors(self, q: Tensor, out: Tensor, lse: Tensor, batch: PagedBatch) -> dict[str, float]:
        """Against float64: ‖out − exact‖ / ‖exact‖ and the largest difference of lse, for queries
        of all rows but a few at most."""
        chosen = np.unique(np.linspace(0, len(q) - 1, SAMPLED_QUERIES).astype(int)).tolist()
        starts = batch.query_start.numpy()
        off, norm, lse_off = 0.0, 0.0, 0.0
        for query in chosen:
            row = int(np.searchsorted(starts, query, side="right")) - 1
            seen = int(batch.query_position[row]) + query - int(starts[row]) + 1
            listed = slice(int(batch.block_start[row]), int(batch.block_start[row + 1]))
            blocks = batch.blocks[listed].to(self._device, torch.int64)
            for head in range(self._heads.kv):
                k, v = (
                    self._pool[blocks, which, head].flatten(0, 1)[:seen].double()
                    for which in (0, 1)
                )
                group = self._heads.query // self._heads.kv
                mine = slice(head * group, (head + 1) * group)
                scores = q[query, mine].double() @ k.T * self._spec.scale
                exact = scores.softmax(-1) @ v
                off += float((out[query, mine] - exact).square().sum())
                norm += float(exact.square().sum())
                gap = float((lse[query, mine] - scores.logsumexp(-1)).abs().max())
                lse_off = max(lse_off, gap) if gap == gap else gap
        return {"out_error": (off / norm) ** 0.5, "lse_error": lse_off}

    def _torch(self, rows: int, queries: int, tokens: int, causal: bool) -> float | None:
        """Seconds of torch's attention over as many tokens, contiguous; None where it has none."""
        heads = self._heads
        shape = (rows, heads.kv, tokens, heads.dim)
        flat = self._pool.flatten()
        half = rows * heads.kv * tokens * heads.dim
        k, v = flat[:half].view(shape), flat[half : 2 * half].view(shape)
        q = torch.randn(rows, heads.query, queries, heads.dim, device=self._device)
        q = q.to(heads.dtype)
        try:
            return seconds(
                [
                    lambda: functional.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=True
                    )
                ],
                self._device,
            )
        except torch.OutOfMemoryError:
            return None


def seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Of one call, the median of several rounds. On a GPU the calls are replayed as a graph, so
    that the time of launches on the host is not part of it."""

    def every() -> None:
        for call in calls:
            call()

    every()
    if device.type != "cuda":
        return _seconds(every) / len(calls)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    graph.replay()
    return _gpu_seconds(graph.replay, device) / len(calls)


def _seconds(call: Callable[[], Any]) -> float:
    rounds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        rounds.append(time.perf_counter() - started)
    return statistics.median(rounds)


def _gpu_seconds(call: Callable[[], Any], device: torch.device) -> float:
    rounds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        rounds.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(rounds)


def _int32(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int32))
