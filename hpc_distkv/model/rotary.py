"""Rotary position embedding: from positions to the tables by which queries and keys turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hpc_distkv.attention import Rotation
from hpc_distkv.model.rope import Rope


class Rotary:
    """Turns pairs (i, i + rotary_dim / 2) of a head by an angle that grows with the position."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope, self._dim = rope, int(head_dim * rope.partial)
        exponents = torch.arange(0, self._dim, 2, dtype=torch.float32) / self._dim
        self._exponents = exponents.to(device)
        stretched = _STRETCH[rope.type](rope, 1.0 / rope.theta**exponents)
        self._frequencies = torch.cat((stretched, stretched)).to(device)
        self._sign = torch.ones(self._dim, device=device)
        self._sign[: self._dim // 2] = -1.0

    @property
    def needs_lengths(self) -> bool:
        """Whether `rotation` needs the lengths of sequences."""
        return self._rope.type == "dynamic"

    def rotation(
        self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
    ) -> Rotation:
        """Tables for `positions` [T], computed in float32, rounded to `dtype`; once per step.

        `lengths` [T]: see `Decoder.hidden`; where it is not given, a token is the last of its
        sequence.
        """
        frequencies = self._frequencies
        if self.needs_lengths:
            frequencies = self._dynamic(positions + 1 if lengths is None else lengths)
        angles = (positions.float()[:, None] * frequencies)[:, None]
        cos, sin = angles.cos(), angles.sin() * self._sign
        if self._rope.amplitude != 1.0:
            cos, sin = cos * self._rope.amplitude, sin * self._rope.amplitude
        return Rotation(cos.to(dtype), sin.to(dtype))

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """Frequencies [T, rotary_dim] whose base grows with the length of the sequence beyond what
        the model was trained for."""
        rope = self._rope
        excess = lengths.clamp(min=rope.original_max_position) / rope.original_max_position
        growth = (rope.factor * excess - (rope.factor - 1)) ** (self._dim / (self._dim - 2))
        frequencies = 1.0 / (rope.theta * growth[:, None]) ** self._exponents
        return torch.cat((frequencies, frequencies), dim=-1)


def _unchanged(rope: Rope, frequencies: Tensor) -> Tensor:
    return frequencies


def _linear(rope: Rope, frequencies: Tensor) -> Tensor:
    return frequencies / rope.factor


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Short waves stay, long waves stretch by `factor`, those between blend smoothly."""
    turns = rope.original_max_position / (2 * math.pi / frequencies)
    band = rope.high_freq_factor - rope.low_freq_factor
    kept = ((turns - rope.low_freq_factor) / band).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: Rope, frequencies: Tensor) -> Tensor:
    """Dimensions that turn often in the original length stay, those that turn less than once
    stretch by `factor`; between, a ramp over the dimensions."""
    half = len(frequencies)

    def dimension(turns: float) -> float:
        """The pair that makes so many turns over the original length."""
        wave = rope.original_max_position / (2 * math.pi * turns)
        return half * math.log(wave) / math.log(rope.theta)

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    stretched = ((torch.arange(half, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return stretched * frequencies / rope.factor + (1 - stretched) * frequencies


_STRETCH: dict[str, Callable[[Rope, Tensor], Tensor]] = {
    "default": _unchanged,
    "linear": _linear,
    "dynamic": _unchanged,
    "llama3": _llama3,
    "yarn": _yarn,
}
