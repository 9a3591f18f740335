"""The model families the decoder can be configured for: one row each, never a new class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row: what a family fixes, and what its checkpoints call things."""

    architecture: str
    required: Mapping[str, tuple[Any, ...]] = field(repr=False, hash=False)
    """Keys of config.json that change the maths, and the values this decoder computes for them;
    the first value is what a missing key means."""
    attention_bias: bool = False
    """Default where config.json does not say; so are the next two."""
    mlp_bias: bool = False
    tie_embeddings: bool = False


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            required={
                "hidden_act": ("silu", "swish"),
                "quantization_config": (None,),
                "sliding_window": (None,),
                "layer_types": (None,),
                "per_layer_config": (None,),
            },
        ),
    )
}
