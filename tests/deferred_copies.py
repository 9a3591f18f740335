"""A device whose copies end late, for tests of what stages tensors on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from local_ranks import network_of

from hpc_distkv.comm.gpu.staged import StagedTransport
from hpc_distkv.comm.transport import Comm

POISON = 0x5A


class Passed:
    def query(self) -> bool:
        return True


class DeferredEvent:
    def __init__(self, happen: Callable[[], None]) -> None:
        self.happen, self.past = happen, False

    def query(self) -> bool:
        return self.past


class DeferredCopies:
    """Computes at once, as tests do, and so copies in at once too; a copy out reads its source when
    it happens, and in order. The host's memory holds garbage until then."""

    def __init__(self) -> None:
        self.waiting: deque[DeferredEvent] = deque()

    def holds(self, tensor: torch.Tensor) -> bool:
        return True

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(like.shape, dtype=like.dtype)
        buffer.view(-1).view(torch.uint8).fill_(POISON)
        return buffer

    def mark(self) -> Passed:
        return Passed()

    def copy_out(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> DeferredEvent:
        pairs = list(zip(sources, targets, strict=True))
        event = DeferredEvent(lambda: [target.copy_(source) for source, target in pairs])
        self.waiting.append(event)
        return event

    def copy_in(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Passed
    ) -> Passed:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return Passed()

    def happen(self) -> None:
        event = self.waiting.popleft()
        event.happen()
        event.past = True


def stage(comms: Sequence[Comm]) -> list[DeferredCopies]:
    """Let the tensors of all ranks go by way of the host; when copies end is up to the schedule of
    their network."""
    network = network_of(comms)
    devices = [DeferredCopies() for _ in comms]
    for comm, copies in zip(comms, devices, strict=True):
        comm.transport = staged = StagedTransport(comm.transport, copies, comm.waiter)
        comm.waiter.always(staged.push)
    events = network.events
    network.events = lambda: [*events(), *(copies.happen for copies in devices if copies.waiting)]
    return devices
