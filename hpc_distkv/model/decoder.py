"""The decoder: one configurable transformer for all families. Knows one attention function, and
neither ranks nor blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.attention import AttentionSpec, Rotation
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.layers import Experts, Linear, Mlp, Norm, Pause
from hpc_distkv.model.rotary import Rotary
from hpc_distkv.model.shard import WHOLE, Alone, Lanes, ModelShard

Attend = Callable[[int, Tensor, Tensor, Rotation | None], Tensor]
"""(layer, qk [T, heads + kv_heads, head_dim], v [T, kv_heads, head_dim], rotation) → [T, heads,
head_dim].

qk are the queries and, behind them, the keys, to which `rotation` is still to be applied (None: the
model has no rotary positions). `Decoder.attention` says how they are scored. The heads of a token
are contiguous in qk and in v. The result may be float32 or the model's dtype."""


def nothing() -> None:
    """A pause in which nothing is done."""


@dataclass
class Layer:
    """The weights of one layer. Rows of `qkv` are Q, K and V, one after another."""

    attention_norm: Norm
    qkv: Linear
    qk_norm: Norm | None
    """Weight [heads + kv_heads, head_dim]."""
    out: Linear
    attention_post_norm: Norm | None
    mlp_norm: Norm
    mlp: Mlp | Experts
    mlp_post_norm: Norm | None


class Decoder:
    """From tokens to logits; the caller computes attention. Call it under `torch.inference_mode`.

    Source of the architecture: Llama (arXiv 2302.13971) with grouped-query attention; what a family
    does otherwise is in its row (`family.py`) and in `config`.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        positions: Tensor | None,
        embedding_norm: Norm | None,
        layers: list[Layer],
        norm: Norm,
        head: Linear,
        shard: ModelShard = WHOLE,
    ) -> None:
        """`embedding` [vocab, hidden], `positions` [max_position, hidden] if they are learned,
        `head` hidden → vocab, or the rows of `shard`, for which `config` then counts heads and
        sizes."""
        self.config = config
        self.shard = shard
        self.lanes: Lanes = Alone()
        """Those that hold the other shards of this model."""
        self.attention = attention_specs(config, shard)
        """How each layer scores queries against keys."""
        self.embedding = embedding
        self.positions = positions
        self.embedding_norm = embedding_norm
        self.layers = layers
        self.norm = norm
        self.head = head
        ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
        rotates = config.family.positions == "rope"
        self._rotaries = [Rotary(r, config.head_dim, self.device) for r in ropes if rotates]
        local = config.local_rope is not None
        self._rotary_of = [int(local and spec.window > 0) for spec in self.attention]
        scaled = config.hidden_size**0.5 if config.family.scaled_embedding else 1.0
        self._embedding_scale = torch.tensor(scaled, dtype=self.dtype).item()

    def among(self, lanes: Lanes) -> Decoder:
        """The same shard, with the same weights, whose sums go over `lanes`."""
        decoder = copy(self)
        decoder.lanes = lanes
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def capturable(self) -> bool:
        """True if `hidden` launches the same kernels for any input and never syncs, so it can be
        captured. False with lanes whose sums need the host, with ropes that need `lengths`, and
        with experts that are computed one by one: `grouped` finds a kernel for all of them only in
        bfloat16, on Hopper and data-centre Blackwell GPUs, with a recent torch."""
        return not (
            self.needs_lengths
            or not self.lanes.recordable
            or any(isinstance(layer.mlp, Experts) and layer.mlp.waits for layer in self.layers)
        )

    @property
    def needs_lengths(self) -> bool:
        """Whether `hidden` needs `lengths`."""
        return any(rotary.needs_lengths for rotary in self._rotaries)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        pause: Pause = nothing,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """All layers over `tokens` [T] int64 at `positions` [T] int64 → [T, hidden].

        The rows may belong to different requests; only `attend` knows. `pause` is called between
        the large operators, for what cannot wait for the end of a step. `lengths` [T] int64: of the
        sequence that a token was part of when it was computed first, that is of its prompt, or of
        all up to it if that is longer; only a rope that depends on lengths looks at it, and takes
        the latter if it is not given. The result is what `logits` takes: the final norm is still to
        come.
        """
        x = self.embed(tokens, positions)
        rotations = self.rotations(positions, lengths)
        for index in range(len(self.layers)):
            x = self.layer(index, x, rotations, attend, pause)
        return x

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Final norm and head: rows [n, hidden] of `hidden` → [n, vocab] float32. Of a shard, lane
        0 gets that, and the others their own columns of it."""
        widths = [len(ids) for ids in self.shard.vocabulary(self.config.vocab_size)]
        logits = self.lanes.joined(self.head(self.norm(hidden_rows)), widths).float()
        if cap := self.config.logit_softcap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [T] int64 → [T, hidden], a tensor of its own for `layer` to change."""
        if self.shard == WHOLE:
            x = functional.embedding(tokens, self.embedding)
        else:
            own = self.shard.lookup(tokens, self.embedding, self.config.vocab_size)
            x = self.lanes.total(own)
        if self._embedding_scale != 1.0:
            x *= self._embedding_scale
        if self.positions is not None:
            x += functional.embedding(positions, self.positions)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def rotations(self, positions: Tensor, lengths: Tensor | None = None) -> list[Rotation]:
        """The rotary tables of a step, for `layer`; see `hidden` for the arguments."""
        return [rotary.rotation(positions, self.dtype, lengths) for rotary in self._rotaries]

    def layer(
        self,
        index: int,
        x: Tensor,
        rotations: list[Rotation],
        attend: Attend,
        pause: Pause = nothing,
    ) -> Tensor:
        """One layer: x [T, hidden] → [T, hidden], in place."""
        layer, config = self.layers[index], self.config
        turning = config.num_heads + config.num_kv_heads
        qkv = layer.qkv(layer.attention_norm(x)).view(len(x), -1, config.head_dim)
        qk, v = qkv[:, :turning], qkv[:, turning:]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        rotation = rotations[self._rotary_of[index]] if rotations else None
        mixed = attend(index, qk, v, rotation)
        mixed = self.lanes.total(layer.out(mixed.reshape(len(x), -1).to(self.dtype)))
        x += _normed(mixed, layer.attention_post_norm)
        pause()
        x += _normed(self.lanes.total(layer.mlp(layer.mlp_norm(x), pause)), layer.mlp_post_norm)
        pause()
        return x


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x)


def attention_specs(config: ModelConfig, shard: ModelShard = WHOLE) -> list[AttentionSpec]:
    """How each layer scores queries against keys; `config` is that of `shard`."""
    scale = (config.query_scalar or config.head_dim) ** -0.5
    slopes = None
    if config.family.positions == "alibi":
        slopes = alibi_slopes(config.num_heads * shard.lanes)
        slopes = slopes.view(shard.lanes, config.num_heads)[shard.lane]
    return [
        AttentionSpec(
            scale=scale / (layer + 1 if config.scale_by_layer else 1),
            window=config.windows[layer] if config.windows else 0,
            softcap=config.attention_softcap,
            slopes=slopes,
        )
        for layer in range(config.num_layers)
    ]


def alibi_slopes(heads: int) -> Tensor:
    """float32 [heads]: for a power of two the geometric series from 2^(-8/heads) to 2^-8; else that
    of the power below, and then every other one of the power above. Source: arXiv 2108.12409."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2 ** (-8 * (2 * head + 1) / (2 * power)) for head in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
