"""One forward pass of one rank: its rows' tokens through the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from hpc_distkv.attention import PagedBatch, Rotation, micro_attention, rotate_and_write
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.step.graphs import DecodeGraphs
from hpc_distkv.step.inputs import Rows, read
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.shared import SharedAttention, groups_of


class Elsewhere(Protocol):
    """Attends to the rBlocks of a step that are not in the pool: `Debtor` and `HostTier`."""

    def post_queries(self, q: torch.Tensor) -> None:
        """Send the rows of `q` `[tokens, heads, head_dim]` that have rBlocks there."""

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the partial results into the rank's own, in place."""


class StepInputs(NamedTuple):
    """What the layers of a step read, on the device."""

    tokens: torch.Tensor
    """As in `Inputs`, as are `positions`, `ends`, `blocks` and `offsets`."""
    positions: torch.Tensor
    ends: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    batch: PagedBatch
    """What the rows attend to at home, without what is `shared`."""
    lengths: torch.Tensor | None
    """As in `Model.hidden`."""
    shared: SharedAttention | None
    elsewhere: Sequence[Elsewhere]
    graphs: DecodeGraphs | None
    """Where the step can be replayed; None if it cannot."""


class Forward:
    """Runs the tokens of a plan through the model. Owns only the tensors of the current step."""

    def __init__(
        self,
        parts: Parts,
        rmanager: RManager,
        between_layers: Callable[[], None],
        pause: Callable[[], None],
    ) -> None:
        """`between_layers` is called once a layer and pushes on control rounds; `pause` is called
        several times a layer and serves debtors. Neither blocks."""
        self._model, self._pool, self._rm = parts.model, parts.pool, rmanager
        self._device, self._graphs = parts.comm.device, parts.graphs
        self._recorder, self._positional = parts.time.recorder, parts.positional
        self._between_layers, self._pause = between_layers, pause

    def run(
        self,
        rows: Rows,
        elsewhere: Sequence[Elsewhere] = (),
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the rows' tokens and store their KV. Returns the float32 logits
        `[sampled rows, vocab]` of the rows that have no token left to compute, in order.
        `elsewhere`: where rows have rBlocks outside the pool; queries are sent in this order, to
        the slowest to answer first. `drawn`: int64, on the device, the tokens that the step before
        has drawn and the host has not read (`TokenSequence.expect`)."""
        if not rows:
            return torch.empty((0, 0))
        step = self._prepare(rows, elsewhere)
        if drawn is not None and len(drawn):
            step = step._replace(tokens=_known(step.tokens, drawn))
        if (replayed := self._replay(step)) is not None:
            return self._model.logits(replayed[: len(rows)])
        attend = partial(self._attend, step)
        hidden = self._model.hidden(step.tokens, step.positions, attend, self._pause, step.lengths)
        self._recorder.layer(-1)
        return self._model.logits(hidden[step.ends]) if len(step.ends) else torch.empty((0, 0))

    def _prepare(self, rows: Rows, elsewhere: Sequence[Elsewhere]) -> StepInputs:
        size = self._pool.block_size
        decodes = all(count == 1 for _, count in rows)
        # Guests would wait for all of a recorded step's hops (`comm.gpu.meeting_transport`).
        free = self._model.lanes.alone or not self._rm.lender.guests
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
        *numbers, batch = inputs
        if self._model.needs_lengths:
            numbers.append(inputs.lengths(rows))
        tokens, positions, ends, blocks, offsets, *lengths = self._device.upload(numbers)
        there = lengths[0] if lengths else None
        return StepInputs(
            tokens, positions, ends, blocks, offsets, batch, there, shared, elsewhere, graphs
        )

    def _replay(self, step: StepInputs) -> torch.Tensor | None:
        """The hidden states of a step that can be replayed."""
        inputs = step.tokens, step.positions, step.blocks, step.offsets
        return step.graphs.hidden(step.batch, inputs) if step.graphs else None

    def _attend(
        self,
        step: StepInputs,
        layer: int,
        qk: torch.Tensor,
        v: torch.Tensor,
        rotation: Rotation | None,
    ) -> torch.Tensor:
        self._recorder.layer(layer)
        self._between_layers()
        cache, spec = self._pool.layer(layer), self._model.attention[layer]
        q = rotate_and_write(qk, v, rotation, *cache, step.blocks, step.offsets)
        for place in step.elsewhere:
            place.post_queries(q)
        out, lse = micro_attention(q, *cache, step.batch, spec, causal=True)
        self._pause()
        if step.shared:
            step.shared.merge(q, cache, spec, out, lse)
            self._pause()
        for place in reversed(step.elsewhere):
            place.merge(layer, out, lse)
            self._pause()
        return out


def _known(tokens: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """`tokens` with placeholders -1 - n replaced by `drawn[n]` (`TokenSequence.expect`)."""
    return torch.where(tokens < 0, drawn[(-1 - tokens).clamp_(min=0)], tokens)
