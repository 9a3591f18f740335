"""Oracles for the decoder: attention written down from its definition, and transformers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_distkv.attention import AttentionSpec, Rotation
from hpc_distkv.attention.reference import rotate
from hpc_distkv.model.decoder import Decoder


class DenseAttention:
    """Causal attention of one growing request in float64, K and V kept whole."""

    def __init__(self, specs: list[AttentionSpec]) -> None:
        self.specs = specs
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, qk: Tensor, v: Tensor, rotation: Rotation | None) -> Tensor:
        assert qk.stride(-1) == v.stride(-1) == 1
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk[:, : -v.shape[1]], qk[:, -v.shape[1] :]
        keys = self.keys[layer] = torch.cat((self.keys.get(layer, k[:0]), k))
        values = self.values[layer] = torch.cat((self.values.get(layer, v[:0]), v))
        group = q.shape[1] // k.shape[1]
        every_key = keys.double().repeat_interleave(group, dim=1)
        every_value = values.double().repeat_interleave(group, dim=1)
        spec = self.specs[layer]
        scores = torch.einsum("thd,shd->hts", q.double(), every_key) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = torch.arange(len(keys) - len(q), len(keys))[:, None] - torch.arange(len(keys))
        if spec.slopes is not None:
            scores = scores - spec.slopes[:, None, None] * distance
        hidden = distance < 0
        if spec.window:
            hidden |= distance >= spec.window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, every_value).float()


def logits_of(decoder: Decoder, tokens: Tensor, cuts: tuple[int, ...] = ()) -> Tensor:
    """Logits of all positions of `tokens` [T], fed in pieces that end at `cuts`."""
    attention = DenseAttention(decoder.attention)
    edges = [0, *cuts, len(tokens)]
    with torch.inference_mode():
        rows = [
            decoder.hidden(tokens[a:b], torch.arange(a, b), attention) for a, b in pairwise(edges)
        ]
        return decoder.logits(torch.cat(rows))


def save_llama(path: Path, max_shard_size: str = "5GB", **changes: Any) -> Any:
    """A small random Llama of transformers, saved to `path`; `changes` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    """What transformers computes for `tokens` [T]: [T, vocab] float32."""
    with torch.inference_mode():
        logits: Tensor = model(tokens[None]).logits[0].float()
        return logits
