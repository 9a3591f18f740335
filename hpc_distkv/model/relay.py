"""Weights that one process reads and hands on to those that hold the same shard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.slots import Slot


class Relay(Protocol):
    """The processes that hold the same shard, of which the first one reads."""

    @property
    def reads(self) -> bool:
        """Whether this one does."""

    def broadcast(self, tensor: Tensor) -> None:
        """The reader's contiguous `tensor` to all, in place. Collective."""


def relayed(
    relay: Relay, wanted: dict[str, Slot], filled: Iterator[list[Slot]]
) -> Iterator[list[Slot]]:
    """What is `wanted`, alike in all processes, in that order, in batches: on the reader those that
    it has `filled` and taken from `wanted`, elsewhere what it hands on. Each batch is

        its size → its tensors

    and a size of 0 says that the reader could not go on: then all raise ModelError, so nobody waits
    for what will not come.
    """
    size = torch.zeros(1, dtype=torch.int64)
    while wanted:
        batch: list[Slot] = []
        try:
            if relay.reads:
                batch = next(filled)
        finally:
            size[0] = len(batch)
            relay.broadcast(size)
        if not relay.reads:
            batch = [wanted.pop(name) for name in list(islice(wanted, int(size)))]
        if not batch:
            raise ModelError("the rank that reads the weights for this one could not")
        for slot in batch:
            tensor = slot.view.contiguous()
            relay.broadcast(tensor)
            if tensor is not slot.view:
                slot.view.copy_(tensor)
        yield batch
