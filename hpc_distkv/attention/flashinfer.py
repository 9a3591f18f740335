"""FlashInfer's kernels behind `micro_attention`, where they are installed and asked for.

One wrapper serves all calls: paged prefill, whose kernels take rows of one query as well. Always in
its "fa2" form: that alone cuts rows along their keys, and a form that is first met in a step would
be compiled in it.

What differs from our own kernels, and where it is made up for: log-sum-exps have base 2 (changed
here), outputs have the dtype of queries (so partial results are rounded once more), masks count
keys from the end of a row's list and know no positions (`Layout`), and a row without keys has no
result (`Layout`: not served).

Source: FlashInfer, arXiv 2501.01005; the wrapper as in flashinfer-python 0.7.2. Not run on a GPU
yet: tested against a double that does what its documentation says.
"""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Hashable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpc_distkv.attention.call import Call
from hpc_distkv.attention.paged import PagedBatch
from hpc_distkv.attention.spec import AttentionSpec
from hpc_distkv.comm.device import Event
from hpc_distkv.errors import UserError

log = logging.getLogger(__name__)

BACKEND = "flashinfer"
INSTALL = "pip install flashinfer-python"
WORKSPACE_BYTES = 64 << 20
"""Of each stream, beside what the partial results of cut rows take."""
BLOCKS_PER_SM, TILE = 2, 128
"""Rows are cut into at most so many parts for each multiprocessor, of at most so many queries."""
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
LN_2 = math.log(2.0)
MOST_SAID = 1000
"""Characters of what a compiler says: the last ones."""


class FlashInferError(UserError):
    """Its kernels cannot be compiled here."""


def missing() -> str | None:
    """Why FlashInfer cannot be used; None if it can. Imports it."""
    try:
        import flashinfer  # noqa: F401
    except Exception as error:  # it looks for compilers and devices when it is imported
        return f"FlashInfer cannot be imported ({error}): {INSTALL}"
    return None


@functools.cache
def kernels(device: torch.device) -> FlashInfer | None:
    """The kernels for tensors on `device`; None for the CPU."""
    if device.type != "cuda":
        return None
    import flashinfer

    return FlashInfer(flashinfer, device)


class Layout(NamedTuple):
    """A batch in FlashInfer's words: int32, on the host; rows without queries are left out."""

    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor

    @classmethod
    def of(cls, batch: PagedBatch, block_size: int, causal: bool, window: int) -> Layout | None:
        """None if FlashInfer's masks hide other keys than those of `micro_attention`, or if a row
        with queries has no keys.

        Its causal mask takes a row's last query for the one of the last key, and its window counts
        keys, not positions. So under a mask the last keys must be the queries' own, without a gap
        among them, and with a window without any gap; keys before a gap are then in the past of
        all queries, as they should be.
        """
        counts = np.diff(batch.query_start.numpy())
        rows = np.flatnonzero(counts)
        counts, tokens = counts[rows], batch.kv_len.numpy()[rows]
        if not rows.size or not tokens.all() or (window and not causal):
            return None
        pages = -(-tokens // block_size)
        indptr = np.concatenate(([0], np.cumsum(pages)))
        listed = np.repeat(batch.block_start.numpy()[rows] - indptr[:-1], pages)
        listed = listed + np.arange(indptr[-1])
        last_page_len = tokens - (pages - 1) * block_size
        if causal:
            first = batch.first_token.numpy()[listed]
            last = first[indptr[1:] - 1] + last_page_len - 1
            if np.any(last != batch.query_position.numpy()[rows] + counts - 1):
                return None
            if np.any(tokens < counts):  # a query would see nothing
                return None
            row = np.repeat(np.arange(len(rows)), pages)[1:]
            inside = np.diff(np.repeat(np.arange(len(rows)), pages)) == 0
            steps = np.diff(first)
            page = np.arange(1, len(first)) - indptr[row]
            own = page * block_size > (tokens - counts)[row]  # the gap would be among the queries
            together = own | (window > 0)
            if np.any(inside & ((steps < block_size) | (together & (steps != block_size)))):
                return None
        starts = np.concatenate(([0], np.cumsum(counts)))
        query_start, page_start, listed_pages, last = (
            torch.from_numpy(numbers.astype(np.int32))
            for numbers in (starts, indptr, batch.blocks.numpy()[listed], last_page_len)
        )
        return cls(query_start, page_start, listed_pages, last)

    def pinned(self) -> Layout:
        """Where it is copied from without waiting."""
        return Layout(
            self.qo_indptr.pin_memory(),
            self.kv_indptr.pin_memory(),
            self.kv_indices.pin_memory(),
            self.last_page_len.pin_memory(),
        )


def workspace_bytes(multiprocessors: int, group: int, dim: int) -> int:
    """What a wrapper may need for query groups of `group` heads: float32 partial results of all
    parts that rows are cut into, `dim` numbers and a log-sum-exp for each query head of a tile."""
    parts = BLOCKS_PER_SM * multiprocessors * TILE * group
    return WORKSPACE_BYTES + 4 * parts * (dim + 1)


class FlashInfer:
    """The kernels on one device, and the wrappers that plans live in: each belongs to one batch
    until that is gone and what it was used for is over."""

    def __init__(self, module: ModuleType | Any, device: torch.device) -> None:
        self._wrapper: Any = module.BatchPrefillWithPagedKVCacheWrapper
        self._device = device
        self._workspaces: dict[Hashable, Tensor] = {}
        """By stream, and the elements that a query group has."""
        on_gpu = device.type == "cuda"
        self._multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        )
        self._idle: defaultdict[Hashable, list[tuple[Any, Event | None]]] = defaultdict(list)

    def layout(
        self, q: Tensor, k_cache: Tensor, batch: PagedBatch, spec: AttentionSpec, *, causal: bool
    ) -> Layout | None:
        """What `micro_attention` takes for this call; None if it does not serve it."""
        num_blocks, _, block_size, dim = k_cache.shape
        if dim not in HEAD_DIMS or q.dtype not in DTYPES or spec.slopes is not None:
            return None
        return batch.derived(
            (BACKEND, block_size, causal, spec.window),
            lambda: self._layout(batch, len(q), num_blocks, block_size, causal, spec.window),
        )

    def micro_attention(self, call: Call, layout: Layout) -> None:
        """`layout`: as `self.layout` gave it for this call."""
        q, k_cache, v_cache, batch, spec, causal, out, lse = call
        options = (q.dtype, q.shape[1:], k_cache.shape, causal)
        wrapper = batch.derived(
            (BACKEND, *options, spec.scale, spec.window, spec.softcap),
            lambda: self._planned(q, k_cache, batch, layout, spec, causal),
        )
        rounded, base_2 = wrapper.run(q, (k_cache, v_cache), return_lse=True)
        out.copy_(rounded)
        torch.mul(base_2, LN_2, out=lse)

    def _layout(
        self,
        batch: PagedBatch,
        queries: int,
        num_blocks: int,
        block_size: int,
        causal: bool,
        window: int,
    ) -> Layout | None:
        batch.check(queries, num_blocks, block_size)
        layout = Layout.of(batch, block_size, causal, window)
        return layout.pinned() if layout and self._device.type == "cuda" else layout

    def _planned(
        self,
        q: Tensor,
        k_cache: Tensor,
        batch: PagedBatch,
        layout: Layout,
        spec: AttentionSpec,
        causal: bool,
    ) -> Any:
        """A wrapper that has planned this batch, on the current stream, and serves it alone. Raises
        FlashInferError."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        _, kv_heads, block_size, dim = k_cache.shape
        group = q.shape[1] // kv_heads
        idle = self._idle[stream, q.dtype, group, dim]
        at = next((at for at, (_, over) in enumerate(idle) if over is None or over.query()), None)
        wrapper = self._new(stream, group, dim) if at is None else idle.pop(at)[0]
        try:
            wrapper.plan(
                layout.qo_indptr,
                layout.kv_indptr,
                layout.kv_indices,
                layout.last_page_len,
                q.shape[1],
                kv_heads,
                dim,
                block_size,
                causal=causal,
                sm_scale=spec.scale,
                window_left=spec.window - 1,
                logits_soft_cap=spec.softcap,
                q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:  # The first plan of a form compiles its kernels.
            raise FlashInferError(
                f"--attention-backend flashinfer cannot be: FlashInfer cannot compile its kernels "
                f"({str(error)[-MOST_SAID:]}): it needs nvcc and ninja on PATH, or what "
                "'flashinfer install-jit-cache-wheel' installs"
            ) from error

        def give_back() -> None:
            idle.append((wrapper, None if stream is None else stream.record_event()))

        weakref.finalize(batch, give_back).atexit = False
        return wrapper

    def _new(self, stream: torch.cuda.Stream | None, group: int, dim: int) -> Any:
        key = stream, group * dim
        if key not in self._workspaces:
            size = workspace_bytes(self._multiprocessors, group, dim)
            self._workspaces[key] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._wrapper(self._workspaces[key], "HND", backend="fa2")
