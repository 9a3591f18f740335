"""Decode steps as CUDA graphs: the launches of a step are recorded once and replayed.

In a decode step of a small model the host, which launches hundreds of kernels, takes several times
as long as the GPU. The launches depend only on the number of rows and on how attention is split. So
steps in which every row decodes with all its rBlocks at home are recorded by that form, with rows
and splits rounded up, and replayed: the host fills in tokens, slots and splits, and launches once.
Sums over the lanes of an instance are part of the graph where no host waits for them, whether or
not other lanes replay the step too.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hpc_distkv.attention import (
    PagedBatch,
    PagedRow,
    Rotation,
    micro_attention,
    rotate_and_write,
)
from hpc_distkv.attention.triton import backend
from hpc_distkv.attention.triton.backend import TritonKernels
from hpc_distkv.attention.triton.launch_plan import LaunchPlan, plan_key
from hpc_distkv.comm.gpu.cuda import new_stream
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.step.inputs import Inputs
from hpc_distkv.step.model import Model, QueryHeads

log = logging.getLogger(__name__)

NO_ROW = PagedRow(1, 0, [], [], 0)
ROW_STEP = 16
"""Rows are rounded up to powers of two, and from here on to multiples."""
MOST_GRAPHS = 64
"""Recorded forms at most: then the least recently used one is dropped. It frees its inputs, its
splits and the GPU's record of its launches; its part of the shared memory is reused by the next
form that is recorded. It cannot be running still: as many other steps have ended since."""
RECORDED_AFTER = 2
"""Steps of a form that run unrecorded first: recording takes longer than several steps."""


def recordable(model: Model, q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """True if decode steps of the model can be recorded. `q` and `k_cache` have the shapes, dtype
    and device of its own."""
    kernels = backend.kernels(k_cache.device) if k_cache.is_cuda else None
    return kernels is not None and all(
        model.capturable and kernels.serves(q, k_cache, spec) for spec in model.attention
    )


def decode_graphs(
    model: Model, pool: BlockPool, heads: QueryHeads, wanted: bool
) -> DecodeGraphs | None:
    """The recorder of decode steps; None if they are not `wanted` or the device has no kernels."""
    kernels = backend.kernels(pool.device) if wanted else None
    return DecodeGraphs(model, pool, kernels, heads) if kernels else None


class DecodeGraphs:
    """The recorded steps of one rank. Owner of the tensors they read and write."""

    def __init__(
        self, model: Model, pool: BlockPool, kernels: TritonKernels, heads: QueryHeads
    ) -> None:
        """Padding rows write to the pool's last rBlock."""
        self._model, self._pool, self._kernels, self._heads = model, pool, kernels, heads
        self._specs = {spec.window: spec for spec in model.attention}
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, DecodeGraph] = {}
        """The least recently used first."""
        self._memory = torch.cuda.graph_pool_handle()
        """Shared by all graphs: the output of one is read before the next is replayed."""
        self._stream = new_stream()
        self._closed = False
        """True once recording has failed: no further form is recorded."""

    def padded(self, inputs: Inputs) -> Inputs:
        """Inputs of decoding rows, rounded up to a form. Padding rows write only to the spare
        rBlock."""
        rows = len(inputs.tokens)
        more = _rounded(rows) - rows
        return inputs.padded(rows + more, self._pool.num_blocks - 1) if more else inputs

    def hidden(self, batch: PagedBatch, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The hidden states `[rows, hidden]` of a `padded` step in which every row has one query;
        None if it has to run as it is. `inputs`, on the device: tokens, positions, slots and places
        in them, `[rows]` each."""
        rows = batch.kv_len.numel()
        q = torch.empty((rows, *self._heads), dtype=self._pool.dtype, device=self._pool.device)
        k_cache, _ = self._pool.layer(0)
        plans = {
            window: self._kernels.plan(q, k_cache, batch, spec, causal=True)
            for window, spec in self._specs.items()
        }
        form = rows, *(plan.form for plan in plans.values())
        graph = recorded = self._graphs.pop(form, None)
        if graph is None:
            self._seen[form] += 1
            if self._closed or self._seen[form] <= RECORDED_AFTER:
                return None
            graph = DecodeGraph(self._model, self._pool, rows, plans)
            for window, spec in self._specs.items():
                key = plan_key(q, k_cache, spec, causal=True)
                graph.batch.remember(key, graph.plans[window])
            if len(self._graphs) == MOST_GRAPHS:
                self._drop(next(iter(self._graphs)))
        self._graphs[form] = graph
        graph.fill(inputs, plans)
        if recorded:
            return graph.replay()
        hidden = graph.compute()
        try:
            graph.record(self._stream, self._memory)
        except RuntimeError as error:  # how torch says that memory is short, among other things
            log.warning(
                "further forms of decode steps are not recorded, so they take longer: %s", error
            )
            self._closed = True
            self._drop(form)
        return hidden

    def _drop(self, form: Hashable) -> None:
        """Forget a form: it is recorded again after `RECORDED_AFTER` more steps of it."""
        del self._graphs[form], self._seen[form]


class DecodeGraph:
    """One recorded step, and the tensors it reads."""

    def __init__(
        self, model: Model, pool: BlockPool, rows: int, plans: dict[int, LaunchPlan]
    ) -> None:
        self._model, self._pool = model, pool
        self.plans = {window: plan.roomy() for window, plan in plans.items()}
        """Window → what attention launches."""
        self.batch = PagedBatch.build([NO_ROW] * rows)
        """Attention is called with it; it holds nothing but the launch plans it remembers."""
        self._inputs: list[torch.Tensor] = []
        self._graph = torch.cuda.CUDAGraph()
        self._hidden = torch.empty(0)

    def fill(self, inputs: Sequence[torch.Tensor], plans: dict[int, LaunchPlan]) -> None:
        """Copy the inputs and splits of a step in."""
        if not self._inputs:
            self._inputs = list(inputs)
        else:
            torch._foreach_copy_(self._inputs, list(inputs))
        for window, plan in plans.items():
            self.plans[window].take(plan)

    def compute(self) -> torch.Tensor:
        """The hidden states `[rows, hidden]`, launched kernel by kernel."""
        tokens, positions, blocks, offsets = self._inputs

        def attend(
            layer: int, qk: torch.Tensor, v: torch.Tensor, rotation: Rotation | None
        ) -> torch.Tensor:
            k_cache, v_cache = self._pool.layer(layer)
            q = rotate_and_write(qk, v, rotation, k_cache, v_cache, blocks, offsets)
            spec = self._model.attention[layer]
            return micro_attention(q, k_cache, v_cache, self.batch, spec, causal=True)[0]

        return self._model.hidden(tokens, positions, attend, lambda: None, None)

    def record(self, stream: torch.cuda.Stream, memory: Any) -> None:
        """Capture `compute` on `stream`; nothing is computed, and the host does not wait. `memory`:
        a handle of graph memory."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _uncollected():
            self._graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                with self._model.lanes.recording(self._graph):
                    self._hidden = self.compute()
            finally:
                self._graph.capture_end()

    def replay(self) -> torch.Tensor:
        """The hidden states of the inputs it was filled with; valid until the next replay."""
        self._model.lanes.replay(self._graph)
        return self._hidden


@contextmanager
def _uncollected() -> Iterator[None]:
    """Suspend garbage collection: it may destroy the graphs of an earlier run, which CUDA forbids
    during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rounded(rows: int) -> int:
    if rows >= ROW_STEP:
        return -(-rows // ROW_STEP) * ROW_STEP
    return 1 << (rows - 1).bit_length()
