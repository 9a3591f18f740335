"""Rotary position embedding: from positions to rotated queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_distkv.model.rope import Rope


class Rotation(NamedTuple):
    """cos and sin [T, 1, head_dim] of the tokens of one step; sin carries the sign of the half."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Turns pairs (i, i + head_dim / 2) of a head by an angle that grows with the position."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = _STRETCH[rope.type](rope, 1.0 / rope.theta**exponents)
        self._frequencies = torch.cat((frequencies, frequencies)).to(device)
        self._sign = torch.ones(head_dim, device=device)
        self._sign[: head_dim // 2] = -1.0

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Tables for `positions` [T], computed in float32, rounded to `dtype`; once per step."""
        angles = (positions.float()[:, None] * self._frequencies)[:, None]
        return Rotation(angles.cos().to(dtype), (angles.sin() * self._sign).to(dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Heads `x` [T, heads, head_dim] at their positions; a new contiguous tensor."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin)


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


_STRETCH: dict[str, Callable[[Rope, Tensor], Tensor]] = {
    "default": _unchanged,
    "linear": _linear,
    "llama3": _llama3,
}
