"""The processor a rank computes on, and which one that is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from hpc_distkv.comm.world import World
from hpc_distkv.errors import UserError


class DeviceError(UserError):
    """The devices that were asked for are not there, or not for each rank."""


class Event(Protocol):
    """A moment in the work of a device."""

    def query(self) -> bool:
        """Whether it has passed. Never blocks."""


class Recorded(Protocol):
    """What a device was asked for, to be asked for again: a CUDA graph."""

    def replay(self) -> None:
        """Ask for all of it, on the current stream."""

    def reset(self) -> None:
        """Forget it."""


class Passed:
    """A moment that has passed."""

    def query(self) -> bool:
        """True."""
        return True


class Fetch:
    """Tensors on their way to the host."""

    def __init__(self, tensors: list[torch.Tensor], event: Event | None = None) -> None:
        """`tensors`: on the host, where they will be after `event`, or are already."""
        self._tensors, self._event = tensors, event

    def ready(self) -> list[torch.Tensor] | None:
        """The tensors, None while they are under way. Never blocks."""
        return self._tensors if self._event is None or self._event.query() else None


class Device:
    """Where the tensors of a rank are, and how numbers get there and back. This one is the host's
    own processor: all that was asked of it is done when the call returns."""

    place = torch.device("cpu")
    deferred = False
    """Whether calls return before what was asked for is done."""

    @property
    def name(self) -> str:
        """For people."""
        return "CPU"

    def serving(self) -> AbstractContextManager[object]:
        """What is computed in this block is for debtors, and need not wait for the own step."""
        return nullcontext()

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the host → the same on the device, for what is computed from now on."""
        return list(tensors)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """Tensors of the device → what they will hold when all that was asked so far is done.
        Never blocks."""
        return Fetch(list(tensors))

    def pin(self, memory: torch.Tensor) -> None:
        """Make memory of the host fit for `copy_beside`. Raises RuntimeError."""

    def copy_beside(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Event:
        """Copy from the device to pinned memory of the host or back, beside what is computed and
        after all that was asked so far. Nothing that is asked for later waits for it, unless
        `wait_event` says so: else neither side may be written to, nor `targets` be read, before the
        event has passed."""
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return Passed()

    def wait_event(self, event: Event) -> None:
        """What is computed from now on comes after `event`, of `copy_beside`. The host does not
        wait."""


class Sight(NamedTuple):
    """What a rank sees of the devices of its node."""

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
