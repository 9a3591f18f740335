"""Which tensor of a checkpoint goes where in a decoder.

The decoder keeps its weights in one form for all families. How a checkpoint stores them (in parts
or fused, transposed, head by head) is undone by views: a tensor is copied into a view of the weight
that has the checkpoint's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder, Layer
from hpc_distkv.model.layers import Experts, Linear, Mlp, Norm
from hpc_distkv.model.shard import Cut


@dataclass(frozen=True)
class Slot:
    """The place of one tensor."""

    view: Tensor
    cut: Cut
    """The part of the checkpoint's tensor that it holds."""
    linear: Linear | None = None
    """The linear layer that it is a part of."""
    offset: float = 0.0
    """Added to what is stored."""
    random: tuple[float, float] = (0.0, 0.0)
    """Mean and deviation of weights that are not from a checkpoint."""

    def fill(self, tensor: Tensor | None) -> None:
        """Take what `cut` reads. A tensor of fewer dimensions than the view is the same for all of
        the view's first."""
        if tensor is None:
            self.view.zero_()
            return
        fits = tensor.numel() == self.view.numel()
        self.view.copy_(tensor.reshape(self.view.shape) if fits else tensor)
        if self.offset:
            self.view.add_(self.offset)

    def fill_randomly(self, generator: torch.Generator) -> None:
        """Take values that keep activations at their size."""
        self.view.normal_(*self.random, generator=generator)


CutOf = Callable[[str, Tensor], Cut]
"""(slot, the decoder's tensor, not transposed) → what of the checkpoint's belongs into it."""


def slots(decoder: Decoder, whole: ModelConfig) -> Iterator[tuple[str, Slot]]:
    """Every tensor a checkpoint must hold, by its full name there; `whole`: what its config.json
    says, of which the decoder may be a shard."""
    config = decoder.config
    family = config.family

    def cut(slot: str, tensor: Tensor) -> Cut:
        return decoder.shard.cut(slot, tensor, whole)

    names = {
        slot: name if slot == "head" else family.prefix + name
        for slot, name in family.names.items()
    }
    yield f"{names['embedding']}.weight", _table("embedding", decoder.embedding, cut)
    if decoder.positions is not None:
        yield f"{names['positions']}.weight", _table("positions", decoder.positions, cut)
    yield from _norm(names, "embedding_norm", decoder.embedding_norm, config)
    for index, layer in enumerate(decoder.layers):
        own = {slot: name.replace("{layer}", str(index)) for slot, name in names.items()}
        yield from _layer(own, layer, config, cut)
    yield from _norm(names, "norm", decoder.norm, config)
    if not config.tie_embeddings:
        yield (
            f"{names['head']}.weight",
            _matrix(decoder.head.weight, decoder.head, cut("head", decoder.head.weight)),
        )


def _layer(
    names: Mapping[str, str], layer: Layer, config: ModelConfig, cut: CutOf
) -> Iterator[tuple[str, Slot]]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield from _norm(names, "attention_norm", layer.attention_norm, config)
    if config.family.interleaved:
        yield from _interleaved(names["qkv"], layer.qkv, config, cut)
    elif "qkv" in names:
        yield from _rows(names, layer.qkv, {"qkv": q + 2 * kv}, config, cut)
    else:
        yield from _rows(names, layer.qkv, {"q": q, "k": kv, "v": kv}, config, cut)
    if layer.qk_norm is not None:
        weight = layer.qk_norm.weight
        yield f"{names['q_norm']}.weight", _norm_weight(weight[: config.num_heads], config)
        yield f"{names['k_norm']}.weight", _norm_weight(weight[config.num_heads :], config)
    yield from _rows(names, layer.out, {"out": config.hidden_size}, config, cut)
    yield from _norm(names, "attention_post_norm", layer.attention_post_norm, config)
    yield from _norm(names, "mlp_norm", layer.mlp_norm, config)
    if isinstance(layer.mlp, Experts):
        yield from _rows(names, layer.mlp.router, {"router": config.num_experts}, config, cut)
        for number, expert in enumerate(layer.mlp.experts):
            own = {slot: name.replace("{expert}", str(number)) for slot, name in names.items()}
            yield from _mlp(own, expert, config, cut)
    else:
        yield from _mlp(names, layer.mlp, config, cut)
    yield from _norm(names, "mlp_post_norm", layer.mlp_post_norm, config)


def _mlp(
    names: Mapping[str, str], mlp: Mlp, config: ModelConfig, cut: CutOf
) -> Iterator[tuple[str, Slot]]:
    size = config.intermediate_size
    if not config.family.gated:
        yield from _rows(names, mlp.up, {"up": size}, config, cut)
    elif "gate_up" in names:
        yield from _rows(names, mlp.up, {"gate_up": 2 * size}, config, cut)
    else:
        yield from _rows(names, mlp.up, {"gate": size, "up": size}, config, cut)
    yield from _rows(names, mlp.down, {"down": config.hidden_size}, config, cut)


def _rows(
    names: Mapping[str, str],
    linear: Linear,
    parts: Mapping[str, int],
    config: ModelConfig,
    cut: CutOf,
) -> Iterator[tuple[str, Slot]]:
    """A linear layer, or the parts of a fused one: slot → rows."""
    start = 0
    for slot, count in parts.items():
        rows = slice(start, start + count)
        view, part = linear.weight[rows], cut(slot, linear.weight[rows])
        if config.family.transposed:
            view, part = view.T, part.transposed
        yield f"{names[slot]}.weight", _matrix(view, linear, part)
        if linear.bias is not None:
            bias = linear.bias[rows]
            yield f"{names[slot]}.bias", Slot(bias, cut(slot, bias), linear)
        start += count


def _interleaved(
    name: str, linear: Linear, config: ModelConfig, cut: CutOf
) -> Iterator[tuple[str, Slot]]:
    """Rows [3, heads, head_dim] that the checkpoint has as [heads, 3, head_dim]."""
    split = (3, config.num_heads, config.head_dim)
    weight = linear.weight.view(*split, -1).transpose(0, 1)
    yield f"{name}.weight", _matrix(weight, linear, cut("interleaved", linear.weight))
    if linear.bias is not None:
        bias = linear.bias.view(split).transpose(0, 1)
        yield f"{name}.bias", Slot(bias, cut("interleaved", linear.bias), linear)


def _norm(
    names: Mapping[str, str], slot: str, norm: Norm | None, config: ModelConfig
) -> Iterator[tuple[str, Slot]]:
    if norm is None:
        return
    yield f"{names[slot]}.weight", _norm_weight(norm.weight, config)
    if norm.bias is not None:
        yield f"{names[slot]}.bias", Slot(norm.bias, Cut(tuple(norm.bias.shape)))


def _norm_weight(weight: Tensor, config: ModelConfig) -> Slot:
    return Slot(
        weight, Cut((weight.shape[-1],)), offset=config.family.norm_offset, random=(1.0, 0.0)
    )


def _matrix(view: Tensor, linear: Linear, cut: Cut) -> Slot:
    return Slot(view, cut, linear, random=(0.0, linear.weight.shape[1] ** -0.5))


def _table(slot: str, weight: Tensor, cut: CutOf) -> Slot:
    return Slot(weight, cut(slot, weight), random=(0.0, 1.0))
