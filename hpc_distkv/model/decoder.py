"""The decoder: one configurable transformer for all families. Knows one attention function, and
neither ranks nor blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.linear import Linear
from hpc_distkv.model.rotary import Rotary, Rotation, rotate
from hpc_distkv.model.shard import WHOLE, Alone, Lanes, Shard

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, head_dim], k [T, kv_heads, head_dim], v like k) → [T, heads, head_dim].

q and k are already rotated; the scale 1/√head_dim is Attend's. The last dimension of q, k and v is
contiguous. The result may be float32 or the model's dtype."""
Pause = Callable[[], None]


def nothing() -> None:
    """The pause of a step that may take as long as it takes."""


@dataclass
class Layer:
    """The weights of one layer. Norms are [hidden]; rows of `qkv` are Q, K, V and those of
    `gate_up` gate, up, one after another."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Tokens in, logits out, attention from outside. Call it under `torch.inference_mode`.

    Source of the architecture: Llama (arXiv 2302.13971) with grouped-query attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        head: Linear,
        shard: Shard = WHOLE,
    ) -> None:
        """`embedding` [vocab, hidden], `norm` [hidden], `head` hidden → vocab, or the rows of
        `shard`, for which `config` then counts heads and sizes."""
        self.config = config
        self.shard = shard
        self.lanes: Lanes = Alone()
        """Those that hold the other shards of this model."""
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self._rotary = Rotary(config.rope, config.head_dim, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def hidden(
        self, tokens: Tensor, positions: Tensor, attend: Attend, pause: Pause = nothing
    ) -> Tensor:
        """All layers over `tokens` [T] int64 at `positions` [T] int64 → [T, hidden].

        The rows may belong to different requests; only `attend` knows. `pause` is called between
        the large operators, for what cannot wait for the end of a step. The result is what
        `logits` takes: the final norm is still to come.
        """
        x = self.embed(tokens)
        rotation = self.rotation(positions)
        for index in range(len(self.layers)):
            x = self.layer(index, x, rotation, attend, pause)
        return x

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Final norm and head: rows [n, hidden] of `hidden` → [n, vocab] float32. Of a shard, lane
        0 gets that, and the others their own columns of it."""
        own = self.head(self._normed(hidden_rows, self.norm))
        widths = [len(ids) for ids in self.shard.vocabulary(self.config.vocab_size)]
        return self.lanes.joined(own, widths).float()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [T] int64 → [T, hidden], a tensor of its own that `layer` may overwrite."""
        if self.shard == WHOLE:
            return functional.embedding(tokens, self.embedding)
        own = self.shard.lookup(tokens, self.embedding, self.config.vocab_size)
        return self.lanes.total(own)

    def rotation(self, positions: Tensor) -> Rotation:
        """The rotary tables of a step, for `layer`: positions [T] int64."""
        return self._rotary.rotation(positions, self.dtype)

    def layer(
        self, index: int, x: Tensor, rotation: Rotation, attend: Attend, pause: Pause = nothing
    ) -> Tensor:
        """One layer: x [T, hidden] → [T, hidden], in place."""
        layer, config = self.layers[index], self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = layer.qkv(self._normed(x, layer.attention_norm)).view(len(x), -1, config.head_dim)
        qk = rotate(qkv[:, : heads + kv_heads], rotation)
        mixed = attend(index, qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :])
        x += self.lanes.total(layer.out(mixed.reshape(len(x), -1).to(self.dtype)))
        pause()
        gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
        pause()
        x += self.lanes.total(layer.down(functional.silu(gate).mul_(up)))
        pause()
        return x

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
