"""Rotary position embedding: what a checkpoint says about it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.settings import FULL, MOST_WHOLE, SLIDING, Settings


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
        """Tokens for which a model is made whose config.json says `max_position`: the stretched
        length. With yarn and llama3 `max_position` may be that already.

        Source: vLLM's rule for --max-model-len, except that yarn never makes it shorter.
        """
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
        section = _Section(read, raw, key)
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise section.error(
                "rope_type", f"{kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        stretched, keys = _TYPES[kind]
        allowed = (*_COMMON, *keys)
        if unknown := [name for name in raw if name not in allowed]:
            raise section.error(unknown[0], f"is not supported for {kind}; supported are {allowed}")
        part = section.positive(
            "partial_rotary_factor", read.positive("partial_rotary_factor", 1.0)
        )
        if part != 1.0 and not (partial and part < 1.0):
            raise ModelError(
                f"{read.where}: partial_rotary_factor {part} is not supported for this architecture"
            )
        return stretched(cls(section.positive("rope_theta", theta), kind, partial=part), section)


class _Section(Settings):
    """What a config.json says about one rope, under a key that errors name."""

    def __init__(self, whole: Settings, raw: Mapping[str, Any], key: str) -> None:
        super().__init__(raw, whole.where)
        self._whole, self._key = whole, key

    def name(self, key: str) -> str:
        return f"{self._key}.{key}"

    @property
    def most(self) -> int:
        return self._whole.whole("max_position_embeddings")

    @property
    def original(self) -> int:
        value = self.positive(_ORIGINAL, self.most)
        if not 1 <= value <= MOST_WHOLE:
            raise self.error(_ORIGINAL, f"must be a number of tokens, not {value!r}")
        return int(value)


def _default(rope: Rope, read: _Section) -> Rope:
    return rope


def _linear(rope: Rope, read: _Section) -> Rope:
    return replace(rope, factor=read.positive("factor"))


def _dynamic(rope: Rope, read: _Section) -> Rope:
    """What transformers does: `_ORIGINAL` is allowed, and does not count."""
    return replace(rope, factor=read.positive("factor"), original_max_position=read.most)


def _llama3(rope: Rope, read: _Section) -> Rope:
    low, high = read.positive("low_freq_factor"), read.positive("high_freq_factor")
    if high <= low:
        raise read.error("high_freq_factor", f"must be above low_freq_factor {low}")
    return replace(
        rope,
        factor=read.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=read.original,
    )


def _yarn(rope: Rope, read: _Section) -> Rope:
    # Only null means the ratio: without the key transformers refuses the section.
    factor = read.positive("factor", read.most / read.original if "factor" in read else None)
    if rope.theta <= 1:
        raise read.error("rope_theta", f"must be above 1, not {rope.theta}")
    grown = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return replace(
        rope,
        factor=factor,
        original_max_position=read.original,
        beta_fast=read.positive("beta_fast", 32.0),
        beta_slow=read.positive("beta_slow", 1.0),
        truncate=read.flag("truncate", True),
        amplitude=read.positive("attention_factor", grown),
    )


_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
_TYPES: dict[str, tuple[Callable[[Rope, _Section], Rope], tuple[str, ...]]] = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "dynamic": (_dynamic, ("factor", _ORIGINAL)),
    "yarn": (
        _yarn,
        (
            *("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "truncate"),
            "finetuned",  # says how the model was made, and changes nothing
        ),
    ),
    "llama3": (_llama3, ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor")),
}
"""Types that are supported: how each is read, and its keys beside the common ones."""
ROPE_TYPES = tuple(_TYPES)
