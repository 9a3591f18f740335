"""Which part of a model one rank of an instance holds: tensor parallelism by heads.

Source: Megatron-LM (arXiv 1909.08053). In attention and in the MLP the first projections are cut
by rows of their weights (their outputs), the second ones by columns (their inputs), so that each of
both takes one sum over the lanes; embedding and head are cut by rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError

ALL = slice(None)


class Lanes(Protocol):
    """What a shard asks of those that hold the rest of its model."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of all lanes' `x`, in place; the same bits everywhere."""

    def joined(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        """On lane 0 all lanes' parts `[rows, widths[lane]]` side by side, elsewhere `part`."""


class Alone:
    """There is nobody else."""

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
    part: slice | None = ALL
    """Along `axis`; None: nothing of it, zeros instead."""

    def read(self, weights: Any, name: str) -> Tensor:
        """The part of tensor `name` of an open safetensors file, of which no more is read."""
        if self.part == ALL:
            whole: Tensor = weights.get_tensor(name)
            return whole
        stored = weights.get_slice(name)
        part: Tensor = stored[(ALL,) * self.axis + (self.part,)]
        return part


@dataclass(frozen=True)
class Shard:
    """Lane `lane` of `lanes`: consecutive query heads, the KV heads these attend to (several lanes
    hold the same one where there are fewer KV heads than lanes), and equal shares of the MLP. The
    shares of the vocabulary may differ by one row."""

    lane: int = 0
    lanes: int = 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """What is left of the model for this shard: fewer heads and a narrower MLP. Raises
        ModelError, naming the sizes that work, if it cannot be cut so."""
        if self.lanes > 1 and not _plain(whole):
            raise ModelError(
                f"--tensor-parallel-size {self.lanes}: checkpoints of {whole.family.architecture}, "
                "with their fused weights or experts, cannot be cut yet; leave it at 1"
            )
        sizes = [lanes for lanes in range(1, whole.num_heads + 1) if divides(whole, lanes)]
        if self.lanes not in sizes:
            raise ModelError(
                f"--tensor-parallel-size {self.lanes} does not divide a model of "
                f"{whole.num_heads} query heads, {whole.num_kv_heads} KV heads and intermediate "
                f"size {whole.intermediate_size}; sizes that do: {', '.join(map(str, sizes))}"
            )
        return replace(
            whole,
            num_heads=whole.num_heads // self.lanes,
            num_kv_heads=max(1, whole.num_kv_heads // self.lanes),
            intermediate_size=whole.intermediate_size // self.lanes,
        )

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

    def cut(self, name: str, shape: tuple[int, ...], whole: ModelConfig) -> Cut:
        """What of tensor `name` (the decoder's name of its layer, see `_KINDS`) is this shard's
        part of that `shape`; `whole`: the model's configuration."""
        kind = _KINDS.get(name, "everywhere") if self.lanes > 1 else "everywhere"
        if kind == "vocabulary":
            ids = self.vocabulary(whole.vocab_size)[self.lane]
            return Cut((whole.vocab_size, *shape[1:]), 0, slice(ids.start, ids.stop))
        if kind == "columns":
            if len(shape) == 1:  # a bias, to be added once
                return Cut(shape, 0, None if self.lane else ALL)
            return Cut((shape[0], shape[1] * self.lanes), 1, _share(self.lane, shape[1]))
        if kind == "everywhere":
            return Cut(shape)
        holders = max(1, self.lanes // whole.num_kv_heads) if kind == "kv rows" else 1
        parts = self.lanes // holders
        return Cut((shape[0] * parts, *shape[1:]), 0, _share(self.lane // holders, shape[0]))


WHOLE = Shard()

_KINDS = {
    "embedding": "vocabulary",
    "head": "vocabulary",
    "q": "rows",
    "k": "kv rows",
    "v": "kv rows",
    "out": "columns",
    "gate": "rows",
    "up": "rows",
    "down": "columns",
}
"""Layer → how it is cut; norms are not."""


def _plain(config: ModelConfig) -> bool:
    """Whether the checkpoint has every projection in a tensor of its own, as it is used."""
    family = config.family
    fused = {"qkv", "gate_up"} & set(family.names)
    return not (fused or family.transposed or family.interleaved or family.experts)


def divides(config: ModelConfig, lanes: int) -> bool:
    """Whether every one of `lanes` can have equal shares of heads and MLP."""
    kv_heads = config.num_kv_heads
    return (
        config.num_heads % lanes == 0
        and config.intermediate_size % lanes == 0
        and (kv_heads % lanes == 0 or lanes % kv_heads == 0)
    )


def _share(index: int, count: int) -> slice:
    return slice(index * count, (index + 1) * count)
