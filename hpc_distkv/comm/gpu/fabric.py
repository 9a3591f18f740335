"""The interface to what moves tensors between GPUs: NCCL, or a double in tests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from hpc_distkv.comm.device import Event
from hpc_distkv.comm.transport import Comm
from hpc_distkv.comm.waiter import Waiter

CHECK_SECONDS = 0.1
"""Between two looks at whether the fabric has failed."""


class Message(NamedTuple):
    """One half of a message, as this rank asks the fabric for it."""

    peer: int
    send: bool
    tensor: torch.Tensor


class Fabric(Protocol):
    """Moves tensors between devices. A message passes when both sides have asked for it; asking
    never waits for other ranks."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it moves this tensor."""

    def mark(self) -> Event:
        """An event behind all work on the current stream."""

    def meet(self, messages: Sequence[Message]) -> Event:
        """Ask for messages, all at once; the event passes when they have. The peers, in a meeting
        one, ask for the same messages in the same order."""

    def ask(self, messages: Sequence[Message]) -> None:
        """The same without an event: while a stream is captured."""

    def within(self, comm: Comm) -> Fabric:
        """A fabric of the ranks of this rank's instance, on the current stream, for stream-ordered
        exchanges. Collective over all ranks."""

    def check(self) -> None:
        """Raise if it has failed."""

    def close(self) -> None:
        """Give up the connections. Collective, when nothing is under way."""


class Passage:
    """Messages that a fabric was asked for, until they have passed."""

    def __init__(self, fabric: Fabric, event: Event, waiter: Waiter) -> None:
        """`event`: of the fabric."""
        self._fabric, self._event, self._waiter = fabric, event, waiter
        self._checked = time.monotonic()

    def over(self) -> bool:
        """Whether it has passed. Raises, now and then, if it never will."""
        if self._event.query():
            self._waiter.moved()
            return True
        if time.monotonic() > self._checked + CHECK_SECONDS:
            self._fabric.check()
            self._checked = time.monotonic()
        return False
