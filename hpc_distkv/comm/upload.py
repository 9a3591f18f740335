"""Getting many small tensors onto a device at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

ALIGNMENT = 16
"""Bytes at whose multiples tensors begin, so that kernels see aligned pointers."""


def upload(tensors: Sequence[torch.Tensor], place: torch.device) -> list[torch.Tensor]:
    """Tensors of the host → the same on `place`, in one copy that nobody waits for.

    The copy is ordered on the current stream; torch's allocator keeps its pinned source until it is
    over.
    """
    if not tensors:
        return []
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    starts = [0, *accumulate(sizes)]
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=place.type == "cuda")
    for tensor, start in zip(tensors, starts, strict=False):
        staged[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
    there = staged.to(place, non_blocking=True)
    return [
        there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=False)
    ]
