"""Counts the bytes of tensors that come into being and are still there."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Account(TorchDispatchMode):
    """While it is entered, on this thread; what it counts is kept between."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in plain((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        self.live = {key: kept for key, kept in self.live.items() if not kept[0].expired()}
        for tensor in plain(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


def plain(tree: object) -> list[torch.Tensor]:
    """Its tensors whose bytes can be seen: all but packed weights."""
    leaves = tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]
