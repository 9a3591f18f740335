"""Which part of a model one rank of an instance holds: tensor parallelism by heads.

Source: Megatron-LM (arXiv 1909.08053). In attention and in the MLP the first projections are cut
by rows of their weights (their outputs), the second ones by columns (their inputs), so that each of
both takes one sum over the lanes; embedding and head are cut by rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.comm.device import Recorded
from hpc_distkv.model.config import ModelConfig

ALL = slice(None)


class Lanes(Protocol):
    """Communication with the lanes that hold the other shards of the model. Collective."""

    def rehearsal(self) -> Lanes:
        """Lanes that take the same memory and do not communicate: to measure that memory."""

    @property
    def alone(self) -> bool:
        """Whether there is one lane."""

    @property
    def recordable(self) -> bool:
        """Whether steps that communicate with these lanes alone can be captured."""

    def recording(self, recorded: Recorded) -> AbstractContextManager[object]:
        """A block in which a step is captured."""

    def replay(self, recorded: Recorded) -> None:
        """Replay a captured step."""

    def begin(self, independent: bool) -> None:
        """A step begins; `independent`: it communicates with these lanes alone."""

    def spread(self, x: Tensor) -> Tensor:
        """Lane 0's `x` on all of them, in place."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of all lanes' `x`, in place; the same bits everywhere."""

    def joined(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        """On lane 0 all lanes' parts `[rows, widths[lane]]` side by side, elsewhere `part`."""


class Alone:
    """One lane, which holds the whole model."""

    alone = recordable = True

    def rehearsal(self) -> Alone:
        """The same."""
        return self

    def recording(self, recorded: Recorded) -> AbstractContextManager[object]:
        """An empty block."""
        return nullcontext()

    def replay(self, recorded: Recorded) -> None:
        """As it is."""
        recorded.replay()

    def begin(self, independent: bool) -> None:
        """Nothing."""

    def spread(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        return x

    def joined(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        """`part` as it is."""
        return part


class Cut(NamedTuple):
    """What a shard holds of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    axis: int = 0
    parts: tuple[slice, ...] = (ALL,)
    """Along `axis`, one after another; empty: nothing of it, zeros instead."""

    def read(self, weights: Any, name: str) -> Tensor | None:
        """The parts of tensor `name` of an open safetensors file, of which no more is read."""
        if not self.parts:
            return None
        if self.parts == (ALL,):
            whole: Tensor = weights.get_tensor(name)
            return whole
        stored = weights.get_slice(name)
        found = [stored[part] if self.axis == 0 else stored[:, part] for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=self.axis)

    @property
    def transposed(self) -> Cut:
        """The same of a checkpoint that stores the transposed matrix."""
        return Cut(self.shape[::-1], 1 - self.axis, self.parts) if len(self.shape) == 2 else self


@dataclass(frozen=True)
class ModelShard:
    """Lane `lane` of `lanes`: consecutive query heads, the KV heads these attend to (several lanes
    hold the same one where there are fewer KV heads than lanes), and equal shares of the MLP. The
    shares of the vocabulary may differ by one row."""

    lane: int = 0
    lanes: int = 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """What is left of the model for this shard. Raises ModelError if it cannot be cut so."""
        return whole.shard(self.lanes)

    def vocabulary(self, size: int) -> list[range]:
        """The token ids that each lane holds, of `size` in all."""
        edges = [size * lane // self.lanes for lane in range(self.lanes + 1)]
        return [range(edges[lane], edges[lane + 1]) for lane in range(self.lanes)]

    def lookup(self, tokens: Tensor, rows: Tensor, vocabulary: int) -> Tensor:
        """The embeddings `[T, hidden]` of tokens `[T]`, of which `rows` are this shard's; zeros for
        tokens of others."""
        own = tokens - self.vocabulary(vocabulary)[self.lane].start
        elsewhere = (own < 0) | (own >= len(rows))
        found = functional.embedding(own.masked_fill_(elsewhere, 0), rows)
        return found.masked_fill_(elsewhere[:, None], 0.0)

    def cut(self, name: str, view: Tensor, whole: ModelConfig) -> Cut:
        """What of the tensors of slot `name` (see `slots.py`) belongs into `view`, this shard's
        part of the decoder's; `whole`: the model's configuration."""
        shape = tuple(view.shape)
        if self.lanes == 1:
            return Cut(shape)
        if name in ("embedding", "head"):
            ids = self.vocabulary(whole.vocab_size)[self.lane]
            return Cut((whole.vocab_size, *shape[1:]), 0, (slice(ids.start, ids.stop),))
        if name in ("out", "down"):
            if view.dim() == 1:  # a bias, to be added once
                return Cut(shape, 0, () if self.lane else (ALL,))
            return Cut((shape[0], shape[1] * self.lanes), 1, (self._share(0, shape[1]),))
        return self._rows(name, shape, whole)

    def _rows(self, name: str, shape: tuple[int, ...], whole: ModelConfig) -> Cut:
        """Of what is cut by rows, if it is cut at all; fused tensors have several runs of rows."""
        dim, kv_heads = whole.head_dim, whole.num_kv_heads
        holders = max(1, self.lanes // kv_heads)
        q, kv, mlp = (whole.num_heads * dim, 1), (kv_heads * dim, holders), whole.intermediate_size
        runs: tuple[tuple[int, int], ...] = {
            "q": (q,),
            "k": (kv,),
            "v": (kv,),
            "qkv": (q, kv, kv),
            "interleaved": ((3 * whole.num_heads * dim, 1),),
            "gate": ((mlp, 1),),
            "up": ((mlp, 1),),
            "gate_up": ((mlp, 1), (mlp, 1)),
        }.get(name, ())
        if not runs:
            return Cut(shape)
        parts, first = [], 0
        for rows, lanes_each in runs:
            parts.append(self._share(first, rows * lanes_each // self.lanes, lanes_each))
            first += rows
        return Cut((first, *shape[1:]), 0, tuple(parts))

    def _share(self, first: int, count: int, holders: int = 1) -> slice:
        """This lane's `count` of what begins at `first`, each share of which has `holders`."""
        start = first + self.lane // holders * count
        return slice(start, start + count)


WHOLE = ModelShard()
