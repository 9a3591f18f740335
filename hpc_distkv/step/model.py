"""What the engine needs of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from hpc_distkv.attention import AttentionSpec
from hpc_distkv.model.decoder import Attend
from hpc_distkv.model.shard import Lanes


class QueryHeads(NamedTuple):
    """Of a rank's shard."""

    num_heads: int
    head_dim: int


class Model(Protocol):
    """What the engine needs of a decoder."""

    @property
    def attention(self) -> Sequence[AttentionSpec]:
        """How each layer scores queries against keys."""

    @property
    def capturable(self) -> bool:
        """True if `hidden` launches the same kernels for any input and never syncs, so it can be
        captured."""

    @property
    def needs_lengths(self) -> bool:
        """Whether `hidden` needs the lengths of the sequences."""

    @property
    def lanes(self) -> Lanes:
        """Those that hold the other shards of it."""

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        pause: Callable[[], None],
        lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens and positions `[T]` → hidden states `[T, hidden]`, as of `Decoder.hidden`;
        `lengths` `[T]` are given if they are needed."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[n, hidden]` → float32 logits `[n, vocab]`."""
