"""The processor a rank computes on, and which one that is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

from hpc_distkv.comm.world import World
from hpc_distkv.errors import UserError


class DeviceError(UserError):
    """The devices that were asked for are not there, or not for each rank."""


class Event(Protocol):
    """A point on a stream of a device, as a CUDA event."""

    def query(self) -> bool:
        """Whether all work before it has ended. Never blocks."""


class Recorded(Protocol):
    """Work that was captured to be launched again: a CUDA graph."""

    def replay(self) -> None:
        """Launch all of it on the current stream."""

    def reset(self) -> None:
        """Forget it."""


class Passed:
    """An event that has passed."""

    def query(self) -> bool:
        """True."""
        return True


class Fetch:
    """A copy of tensors to the host, under way."""

    def __init__(self, tensors: list[torch.Tensor], event: Event | None = None) -> None:
        """`tensors`: on the host, complete once `event` has passed; None: already."""
        self._tensors, self._event = tensors, event

    def ready(self) -> list[torch.Tensor] | None:
        """The tensors; None while the copy is under way. Never blocks."""
        return self._tensors if self._event is None or self._event.query() else None


class Device:
    """The device that holds a rank's tensors, and the copies to and from it. This one is the CPU:
    every call has done its work when it returns."""

    place = torch.device("cpu")
    deferred = False
    """Whether calls return before the device has done the work."""

    @property
    def name(self) -> str:
        """For people."""
        return "CPU"

    def serving(self) -> AbstractContextManager[object]:
        """In this block work is launched for debtors: it does not wait for the own step."""
        return nullcontext()

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of host tensors on the device; work that is launched later waits for them."""
        return list(tensors)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """Copy tensors to the host after the work launched so far. Never blocks."""
        return Fetch(list(tensors))

    def pin(self, memory: torch.Tensor) -> None:
        """Pin host memory, as `copy_beside` needs it. Raises RuntimeError."""

    def copy_beside(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Event:
        """Copy from the device to pinned host memory or back, on its own stream, after the work
        launched so far. Later work does not wait for the copy unless `wait_event` says so: before
        the event has passed neither side may be written to, nor `targets` be read."""
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return Passed()

    def wait_event(self, event: Event) -> None:
        """Work that is launched later runs after `event`, of `copy_beside`. The host does not
        wait."""


class Sight(NamedTuple):
    """The GPUs of its node that a rank sees."""

    devices: int
    """CUDA devices that are visible to it."""
    uuid: str = ""
    """Of the one it would take; empty: the host's processor."""
    part: bool = False
    """Whether that is a part of a GPU (MIG)."""


def own_index(devices: int, local_rank: int) -> int:
    """The CUDA device of a rank among the visible ones: launchers show a rank all devices of its
    node, or its own alone."""
    return local_rank % devices


def fault(sights: Sequence[Sight], world: World, wanted: str, sharing: bool) -> str | None:
    """Why ranks with these sights cannot use `wanted` ("auto", "cpu" or "cuda"); None if they can.
    The same on all ranks."""
    blind = [rank for rank, sight in enumerate(sights) if not sight.uuid]
    if wanted == "cuda" and blind:
        return (
            f"{world.name(blind[0])} sees no CUDA device: ask the launcher for one "
            "(--gpus-per-node), install a CUDA build of torch, or give --device cpu"
        )
    if 0 < len(blind) < len(sights):
        seeing = next(rank for rank, sight in enumerate(sights) if sight.uuid)
        return (
            f"{world.name(seeing)} sees a CUDA device and {world.name(blind[0])} sees none: ask "
            "the launcher for one on every node, or give --device cpu"
        )
    owners: dict[str, int] = {}
    for rank, sight in enumerate(sights):
        owner = owners.setdefault(sight.uuid, rank) if sight.uuid else rank
        if owner != rank and not sharing:
            return (
                f"{world.name(owner)} and {world.name(rank)} would share one GPU, {sight.uuid}; "
                f"{world.name(rank)} sees {sight.devices}: start as many ranks on a node as it has "
                "GPUs, or, to share them for a trial, give --allow-gpu-sharing"
            )
    return None


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
