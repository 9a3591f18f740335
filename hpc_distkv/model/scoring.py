"""How the layers of a model score queries against keys: from its configuration to the options of
MicroAttention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_distkv.attention import AttentionSpec
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.shard import WHOLE, Shard


def attention_specs(config: ModelConfig, shard: Shard = WHOLE) -> list[AttentionSpec]:
    """One for each layer; `config` as of `shard`."""
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
