"""One forward pass of one rank: its rows' tokens through the layers."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Protocol

import torch

from hpc_distkv.attention import PagedBatch, PagedRow, micro_attention, write_kv
from hpc_distkv.comm.device import Device
from hpc_distkv.engine.graphs import DecodeGraphs
from hpc_distkv.engine.model import Model
from hpc_distkv.engine.recorder import Recorder
from hpc_distkv.engine.scheduler import Row
from hpc_distkv.engine.shared import SharedAttention, groups_of
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.rmanager import RManager


class Elsewhere(Protocol):
    """What attends to the rBlocks of a step that are not in the pool: `Debtor`, `HostTier`."""

    def post_queries(self, q: torch.Tensor) -> None:
        """Send off the rows of `q` `[tokens, heads, head_dim]` that have rBlocks there."""

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the partial results into the rank's own, in place."""


class Forward:
    """Runs plans through the model. Owns nothing but the tensors of the step at hand."""

    def __init__(
        self,
        model: Model,
        pool: BlockPool,
        rmanager: RManager,
        device: Device,
        between_layers: Callable[[], None],
        pause: Callable[[], None],
        recorder: Recorder,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`between_layers` is called once a layer, so that control rounds go on during a step,
        `pause` more often, so that debtors are served; `graphs`: for steps that can be replayed, on
        a device that can."""
        self._model, self._pool, self._rm, self._specs = model, pool, rmanager, model.attention
        self._device, self._graphs = device, graphs
        self._between_layers, self._pause = between_layers, pause
        self._positional = any(spec.positional for spec in model.attention)
        self._recorder = recorder

    def run(self, rows: Sequence[Row], elsewhere: Sequence[Elsewhere] = ()) -> torch.Tensor:
        """Compute the rows' tokens and store their KV. Returns the float32 logits
        `[sampled rows, vocab]` of those rows that have no token left to compute, in order.
        `elsewhere`: where rows have rBlocks beside the pool; queries are sent in this order, and
        what takes longest to answer comes first."""
        if not rows:
            return torch.empty((0, 0))
        size = self._pool.block_size
        decodes = all(count == 1 for _, count in rows)
        replayable = self._graphs is not None and not elsewhere and decodes
        groups = {} if self._positional else groups_of(self._rm, rows, size, replayable)
        shared = SharedAttention(groups, rows, size, self._device) if groups else None
        apart = {prefix.id for prefixes in groups.values() for prefix in prefixes}
        paged = [self._paged_row(row, apart) for row in rows]
        inputs = [*self._inputs(rows), *self._slots(rows)]
        tokens, positions, ends, lengths, blocks, offsets = self._device.upload(inputs)
        if self._graphs and replayable and not shared and len(ends) == len(rows):
            replayed = self._graphs.hidden(paged, (tokens, positions, blocks, offsets))
            if replayed is not None:
                return self._model.logits(replayed)
        batch = PagedBatch.build(paged)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._recorder.layer(layer)
            self._between_layers()
            k_cache, v_cache = self._pool.layer(layer)
            write_kv(k, v, k_cache, v_cache, blocks, offsets)
            for place in elsewhere:
                place.post_queries(q)
            out, lse = micro_attention(q, k_cache, v_cache, batch, self._specs[layer], causal=True)
            self._pause()
            if shared:
                shared.merge(q, (k_cache, v_cache), self._specs[layer], out, lse)
                self._pause()
            for place in reversed(elsewhere):
                place.merge(layer, out, lse)
                self._pause()
            return out

        hidden = self._model.hidden(
            tokens, positions, attend, self._pause, lengths if len(lengths) else None
        )
        self._recorder.layer(-1)
        return self._model.logits(hidden[ends]) if len(ends) else torch.empty((0, 0))

    def _inputs(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """int64: tokens and positions; which of them end a row that has no token left to compute;
        if the model needs them, lengths: a recomputed token gets the one it had when it was
        computed first."""
        tokens = [t for s, n in rows for t in s.tokens[s.computed : s.computed + n]]
        positions = [p for s, n in rows for p in range(s.computed, s.computed + n)]
        ends, end = [], 0
        for sequence, count in rows:
            end += count
            if sequence.remaining == count:
                ends.append(end - 1)
        lengths: list[int] = []
        if self._model.needs_lengths:
            least = [s.request.prompt_len for s, n in rows for _ in range(n)]
            lengths = [max(p + 1, n) for p, n in zip(positions, least, strict=True)]
        return [
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in (tokens, positions, ends, lengths)
        ]

    def _paged_row(self, row: Row, apart: Container[int]) -> PagedRow:
        """What the row attends to at home, but for the prefixes of `apart`."""
        sequence, count = row
        table, size = self._rm.tables[sequence.id], self._pool.block_size
        prefixes = [p for p in self._rm.prefixes.chain(sequence.id) if p.id not in apart]
        slots = [slot for part in (*prefixes, table) for slot in part.slots]
        indices = [index for part in (*prefixes, table) for index in part.indices]
        own = sequence.computed + count - table.absent * size
        return PagedRow(
            queries=count,
            query_position=sequence.computed,
            blocks=slots,
            first_token=[index * size for index in indices],
            kv_len=own + size * (len(slots) - len(table.slots)),
        )

    def _slots(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot and place within it of every token of the step. They are in the last rBlocks of a
        table, which are at home."""
        blocks: list[int] = []
        offsets: list[int] = []
        size = self._pool.block_size
        for sequence, count in rows:
            table = self._rm.tables[sequence.id]
            shift = table.absent
            for position in range(sequence.computed, sequence.computed + count):
                block, offset = divmod(position, size)
                blocks.append(table.slots[block - shift])
                offsets.append(offset)
        return torch.tensor(blocks, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
