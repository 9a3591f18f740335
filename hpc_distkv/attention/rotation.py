"""Rotary position embedding as attention applies it: tables of a step, and the turn itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin [T, 1, rotary_dim] of a step's tokens; sin carries the sign of the half."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Heads `x` [T, heads, head_dim], those of a token contiguous, at their positions; a new
    contiguous tensor. Numbers i and i + rotary_dim / 2 of a head turn as a pair; those beyond
    rotary_dim stay. In plain torch, on any device."""
    dim = rotation.cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], rotation), x[..., dim:]), dim=-1)
    swapped = torch.roll(x, dim // 2, dims=-1)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin)
