"""Weights that one process reads and hands on to those that hold the same shard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hpc_distkv.model.errors import ModelError


class Relay(Protocol):
    """The processes that hold the same shard, of which the first one reads."""

    @property
    def reads(self) -> bool:
        """Whether this one does."""

    def broadcast(self, tensor: Tensor) -> None:
        """The reader's contiguous `tensor` to all, in place. Collective."""


class Place(Protocol):
    """Where one tensor goes."""

    @property
    def view(self) -> Tensor:
        """Alike in all processes."""


P = TypeVar("P", bound=Place)


def relayed(relay: Relay, wanted: dict[str, P], filled: Iterator[list[P]]) -> Iterator[list[P]]:
    """What is `wanted`, in that order, in batches: on the reader those that it has `filled` and
    taken from `wanted`, elsewhere what it hands on. Each batch is

        its size → its tensors

    and a size of 0 says that the reader could not go on: then all raise ModelError, so nobody waits
    for what will not come.
    """
    size = torch.zeros(1, dtype=torch.int64)
    while wanted:
        batch: list[P] = []
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
        for place in batch:
            tensor = place.view.contiguous()
            relay.broadcast(tensor)
            if tensor is not place.view:
                place.view.copy_(tensor)
        yield batch
