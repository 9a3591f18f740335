"""Rotary position embedding: what a checkpoint says about it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.settings import Settings
from hpc_distkv.model.windows import FULL, SLIDING

_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
}
"""Types that are supported, and the keys each may have beside the common ones."""
ROPE_TYPES = tuple(_KEYS)


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Source: RoFormer (arXiv 2104.09864); `linear` from position interpolation (arXiv 2306.15595);
    `dynamic` (NTK-aware) and `yarn` from arXiv 2309.00071; `llama3` from the Llama 3.1 release,
    section "long context" of arXiv 2407.21783.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the band between its two betas ends at whole dimensions."""
    amplitude: float = 1.0
    """Of cos and sin."""
    partial: float = 1.0
    """Part of each head that turns, its first dimensions."""

    def reach(self, max_position: int) -> int:
        """Tokens for which a model is made whose config.json says `max_position`. Where positions
        are stretched that may be the length before or behind the stretch: the larger one counts."""
        if self.type in ("linear", "dynamic"):
            return int(max_position * self.factor)
        if self.type == "yarn":
            return max(max_position, int(self.original_max_position * self.factor))
        return max_position

    @classmethod
    def of_layers(
        cls, read: Settings, local: bool = False, partial: bool = False
    ) -> tuple[Rope, Rope | None]:
        """The rope of layers that attend to everything, and with `local` that of layers with a
        window (Gemma 3). `partial`: whether a part of each head may stay as it is.

        Reads `rope_parameters` (transformers 5), or `rope_theta`, `rope_local_base_freq` and
        `rope_scaling` (earlier); of both, as transformers does, the latter. Raises ModelError for a
        type or key that is not supported.
        """
        both = read.get("rope_scaling") and read.get("rope_parameters")
        if both and local:  # Transformers would mix them.
            raise read.error(
                "rope_scaling", "and rope_parameters exclude each other: leave one out"
            )
        key = "rope_scaling" if read.get("rope_scaling") else "rope_parameters"
        section = read.section(key)
        if not local:
            return cls._parse(read, section, key, read.positive("rope_theta", 1e4), partial), None
        theta = read.positive("rope_theta", 1e6)
        local_theta = read.positive("rope_local_base_freq", 1e4)
        if key == "rope_scaling":
            return cls._parse(read, section, key, theta, partial), cls(local_theta)
        for name in section:
            if name not in (FULL, SLIDING) or not isinstance(section[name], Mapping):
                raise read.error(f"{key}.{name}", f"must be one of {FULL} and {SLIDING}")
        full, sliding = section.get(FULL, {}), section.get(SLIDING, {})
        return (
            cls._parse(read, full, f"{key}.{FULL}", theta, partial),
            cls._parse(read, sliding, f"{key}.{SLIDING}", local_theta, partial),
        )

    @classmethod
    def _parse(
        cls, read: Settings, raw: Mapping[str, Any], key: str, theta: float, partial: bool
    ) -> Rope:
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise read.error(
                f"{key}.rope_type", f"{kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        allowed = (*_COMMON, *_KEYS[kind])
        if unknown := [name for name in raw if name not in allowed]:
            raise read.error(
                f"{key}.{unknown[0]}", f"is not supported for {kind}; supported are {allowed}"
            )
        section = Settings({f"{key}.{name}": value for name, value in raw.items()}, read.where)

        def number(name: str, default: float | None = None) -> float:
            return section.positive(f"{key}.{name}", default)

        part = number("partial_rotary_factor", read.positive("partial_rotary_factor", 1.0))
        if part != 1.0 and not (partial and part < 1.0):
            raise ModelError(
                f"{read.where}: partial_rotary_factor {part} is not supported for this architecture"
            )
        theta = number("rope_theta", theta)
        if kind == "default":
            return cls(theta, partial=part)
        most = read.whole("max_position_embeddings")
        original = int(number("original_max_position_embeddings", most))
        # What transformers does: this type goes by the length that config.json names first.
        original = most if kind == "dynamic" else original
        # Only null means the ratio: without the key transformers refuses the section.
        implied = most / original if kind == "yarn" and "factor" in raw else None
        factor = number("factor", implied)
        rope = {"theta": theta, "type": kind, "factor": factor, "partial": part}
        if kind == "linear":
            return cls(**rope)
        if kind == "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if high <= low:
                raise read.error(f"{key}.high_freq_factor", f"must be above low_freq_factor {low}")
            return cls(
                **rope,
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position=original,
            )
        if kind == "dynamic":
            return cls(**rope, original_max_position=original)
        grown = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return cls(
            **rope,
            original_max_position=original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=section.flag(f"{key}.truncate", True),
            amplitude=number("attention_factor", grown),
        )
