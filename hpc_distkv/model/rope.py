"""Rotary position embedding: what a checkpoint says about it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_distkv.model.errors import ModelError

ROPE_TYPES = ("default", "linear", "llama3")

_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Source: RoFormer (arXiv 2104.09864); `linear` from position interpolation (arXiv 2306.15595);
    `llama3` from the Llama 3.1 release, section "long context" of arXiv 2407.21783.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], where: str) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (earlier).

        `where` names the file in errors. Raises ModelError for a type that is not supported.
        """
        key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        scaling = raw.get(key) or {}
        if not isinstance(scaling, Mapping):
            raise ModelError(f"{where}: {key} must be an object, not {scaling!r}")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"{where}: {key}.rope_type {kind!r} is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )
        if unknown := [name for name in scaling if name not in _KEYS]:
            raise ModelError(f"{where}: {key}.{unknown[0]} is not supported; supported are {_KEYS}")
        if scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ModelError(f"{where}: partial_rotary_factor is not supported; it must be 1.0")

        def number(name: str, default: float | None) -> float:
            value = scaling.get(name, default)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ModelError(f"{where}: {key}.{name} must be a positive number, not {value!r}")
            return float(value)

        theta = number("rope_theta", raw.get("rope_theta") or 10000.0)
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, number("factor", None))
        return cls(
            theta,
            kind,
            number("factor", None),
            number("low_freq_factor", None),
            number("high_freq_factor", None),
            int(number("original_max_position_embeddings", raw.get("max_position_embeddings"))),
        )
