"""A device that computes at once, as tests do, but tells the host late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, MutableSequence, Sequence
from functools import partial

import torch
from deferred_copies import POISON, DeferredEvent
from local_ranks import network_of

from hpc_distkv.comm.device import Device, Fetch
from hpc_distkv.comm.transport import Comm


class LateDevice(Device):
    """What it is asked to fetch is garbage until the schedule lets it arrive, in order. Copies
    beside what it computes read when they arrive, in any order, or when what it computes waits for
    them; where they go is garbage until then."""

    deferred = True

    def __init__(self) -> None:
        self.waiting: deque[DeferredEvent] = deque()
        self.beside: list[DeferredEvent] = []

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        there = [tensor.clone() for tensor in tensors]
        here = [torch.empty_like(tensor) for tensor in tensors]
        for tensor in here:
            tensor.view(-1).view(torch.uint8).fill_(POISON)
        pairs = list(zip(here, there, strict=True))
        event = DeferredEvent(lambda: [to.copy_(source) for to, source in pairs])
        self.waiting.append(event)
        return Fetch(here, event)

    def copy_beside(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> DeferredEvent:
        for tensor in targets:
            tensor.view(-1).view(torch.uint8).fill_(POISON)
        pairs = list(zip(targets, sources, strict=True))
        event = DeferredEvent(lambda: [to.copy_(source) for to, source in pairs])
        self.beside.append(event)
        return event

    def wait_event(self, event: DeferredEvent) -> None:
        if event in self.beside:
            self._happen(event, self.beside)

    @property
    def events(self) -> list[Callable[[], None]]:
        copies = [partial(self._happen, event, self.beside) for event in self.beside]
        fetched = list(self.waiting)[:1]
        return [*(partial(self._happen, event, self.waiting) for event in fetched), *copies]

    def _happen(self, event: DeferredEvent, among: MutableSequence[DeferredEvent]) -> None:
        among.remove(event)
        event.happen()
        event.past = True


def be_late(comms: Sequence[Comm]) -> None:
    """Give all ranks such a device; when it is done is up to the schedule of their network."""
    network, devices = network_of(comms), [LateDevice() for _ in comms]
    for comm, device in zip(comms, devices, strict=True):
        comm.device = device
    events = network.events
    network.events = lambda: [*events(), *(event for device in devices for event in device.events)]
