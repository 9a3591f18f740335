"""What kernels ask of tensors: of their layout, and that indices are where the others are."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_distkv.comm.device import upload


def inner_contiguous(tensor: Tensor) -> bool:
    """Whether all but the first dimension is contiguous: the first stride is free."""
    shape, strides, step = tensor.shape, tensor.stride(), 1
    for axis in range(len(strides) - 1, 0, -1):
        size = shape[axis]
        if strides[axis] != step and size != 1:
            return tensor.numel() == 0
        step *= size
    return True


def index_on(device: torch.device, index: Tensor, limit: int, refusal: str) -> Tensor:
    """`index` on `device`; one on the CPU is compared with `limit` before it is copied. Raises
    ValueError(refusal)."""
    if not index.is_cpu:
        return index
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
        raise ValueError(refusal)
    return index if device.type == "cpu" else upload([index], device)[0]
