"""Getting many small index tensors onto a device at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 4
"""int32s: 16 bytes, so that kernels see aligned pointers whatever the lengths are."""


def to_device(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """int32 copies of `arrays` on `device`, flattened, in one transfer that nobody waits for.

    The transfer is ordered on the current stream; the caching host allocator keeps its pinned
    source until it is over.
    """
    lengths = [-(-array.size // ALIGNMENT) * ALIGNMENT for array in arrays]
    packed = torch.empty(sum(lengths), dtype=torch.int32, pin_memory=device.type == "cuda")
    starts = [0, *accumulate(lengths)]
    numbers = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        numbers[start : start + array.size] = array.reshape(-1)
    copied = packed.to(device, non_blocking=True)
    return [
        copied[start : start + array.size] for start, array in zip(starts, arrays, strict=False)
    ]


def index_on(device: torch.device, index: Tensor, limit: int, refusal: str) -> Tensor:
    """`index` on `device`; one on the CPU is compared with `limit` before it is copied. Raises
    ValueError(refusal)."""
    if not index.is_cpu:
        return index
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
        raise ValueError(refusal)
    return index if device.type == "cpu" else to_device([index.numpy()], device)[0]
