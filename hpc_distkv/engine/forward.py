"""One forward pass of one rank: its rows' tokens through the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hpc_distkv.attention import Rotation, micro_attention, rotate_and_write
from hpc_distkv.comm.device import Device
from hpc_distkv.engine.graphs import DecodeGraphs
from hpc_distkv.engine.inputs import read
from hpc_distkv.engine.model import Model
from hpc_distkv.engine.plan import Row
from hpc_distkv.engine.recorder import Recorder
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

    def run(
        self,
        rows: Sequence[Row],
        elsewhere: Sequence[Elsewhere] = (),
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the rows' tokens and store their KV. Returns the float32 logits
        `[sampled rows, vocab]` of those rows that have no token left to compute, in order.
        `elsewhere`: where rows have rBlocks beside the pool; queries are sent in this order, and
        what takes longest to answer comes first. `drawn`, on the device, if tokens may be among
        those that the step before has drawn: see `Sequence.expect`."""
        if not rows:
            return torch.empty((0, 0))
        size = self._pool.block_size
        decodes = all(count == 1 for _, count in rows)
        # Guests would wait for all of a recorded step's hops (`comm.meeting_transport`).
        free = self._model.lanes.alone or not self._rm.guests
        graphs = self._graphs if decodes and free and not elsewhere else None
        replayable = graphs is not None
        groups = {} if self._positional else groups_of(self._rm, rows, size, replayable)
        shared = SharedAttention(groups, rows, size, self._device) if groups else None
        apart = {prefix.id for prefixes in groups.values() for prefix in prefixes}
        inputs = read(self._rm, rows, size, apart)
        if shared or len(inputs.ends) < len(rows):
            graphs = None
        if graphs:
            inputs = graphs.padded(inputs)
        numbers = [*inputs[:-1]]
        if self._model.needs_lengths:
            numbers.append(inputs.lengths(rows))
        tokens, positions, ends, blocks, offsets, *lengths = self._device.upload(numbers)
        if drawn is not None and len(drawn):
            tokens = torch.where(tokens < 0, drawn[(-1 - tokens).clamp_(min=0)], tokens)
        batch = inputs.batch
        if graphs:
            replayed = graphs.hidden(batch, (tokens, positions, blocks, offsets))
            if replayed is not None:
                return self._model.logits(replayed[: len(rows)])

        def attend(
            layer: int, qk: torch.Tensor, v: torch.Tensor, rotation: Rotation | None
        ) -> torch.Tensor:
            self._recorder.layer(layer)
            self._between_layers()
            k_cache, v_cache = self._pool.layer(layer)
            q = rotate_and_write(qk, v, rotation, k_cache, v_cache, blocks, offsets)
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
            tokens, positions, attend, self._pause, lengths[0] if lengths else None
        )
        self._recorder.layer(-1)
        return self._model.logits(hidden[ends]) if len(ends) else torch.empty((0, 0))
