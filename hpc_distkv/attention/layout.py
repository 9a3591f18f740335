"""The one thing all kernels ask of a tensor's layout."""

from torch import Tensor


def inner_contiguous(tensor: Tensor) -> bool:
    """Whether all but the first dimension is contiguous: the first stride is free."""
    shape, strides, step = tensor.shape, tensor.stride(), 1
    for axis in range(len(strides) - 1, 0, -1):
        size = shape[axis]
        if strides[axis] != step and size != 1:
            return tensor.numel() == 0
        step *= size
    return True
