"""What lies between ranks of one process: channels that hold messages under way."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch
from seeded_schedule import PeerFailedError, SeededSchedule

POISON = 0xA5


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in place."""
    assert tensor.is_contiguous()
    return tensor.detach().reshape(-1).view(torch.uint8)


class Channel(ABC):
    """Messages of one kind under way from one rank to another."""

    @abstractmethod
    def has_event(self) -> bool:
        """Whether something could happen to them."""

    @abstractmethod
    def event(self) -> None:
        """Let it happen."""

    @abstractmethod
    def undelivered(self) -> int:
        """How many nobody has received."""


class BytesChannel(Channel):
    """Messages from one rank to another, in order."""

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self.arrived: deque[bytes] = deque()

    def has_event(self) -> bool:
        """Whether a message could arrive."""
        return bool(self.sent)

    def event(self) -> None:
        """The next message arrives."""
        self.arrived.append(self.sent.popleft())

    def undelivered(self) -> int:
        """Messages nobody has taken."""
        return len(self.sent) + len(self.arrived)


NOTHING = torch.empty(0, dtype=torch.uint8)


class Half:
    """One send or one receive of an exchange: `data` is the caller's own memory until `done`."""

    def __init__(self, peer: int, tensor: torch.Tensor, eager: bool = False) -> None:
        self.peer = peer
        self.data = as_bytes(tensor)
        self.eager = eager
        """For a send: it may complete before its receive is posted, as small MPI messages do."""
        self.done = False


class TensorChannel(Channel):
    """Tensors from one rank to another: the n-th send meets the n-th receive.

    A send's memory is read when an event happens to it, not when it is posted: whoever changes it
    before the send is done sends garbage, as with MPI.
    """

    def __init__(self) -> None:
        self.sends: deque[Half] = deque()
        self.recvs: deque[Half] = deque()

    def has_event(self) -> bool:
        """Whether the oldest send could be delivered, or copied out of the sender's memory."""
        return bool(self.sends) and (
            bool(self.recvs) or (self.sends[0].eager and not self.sends[0].done)
        )

    def event(self) -> None:
        """Deliver the oldest send, or else copy it out."""
        if not self.recvs:
            send = self.sends[0]
            send.data = send.data.clone()
            send.done = True
            return
        send, recv = self.sends.popleft(), self.recvs.popleft()
        assert len(send.data) == len(recv.data), (
            f"rank {recv.peer} sent {len(send.data)} bytes to rank {send.peer} "
            f"where {len(recv.data)} were expected"
        )
        recv.data.copy_(send.data)
        recv.data = send.data = NOTHING
        send.done = recv.done = True

    def undelivered(self) -> int:
        """Sends without a receive and receives without a send."""
        return len(self.sends) + len(self.recvs)


class Network:
    """All channels of one process's ranks. Owns every message between post and receipt.

    Without a schedule every event happens at once, under a lock; with one, when it is chosen.
    """

    def __init__(self, ranks: int, schedule: SeededSchedule | None) -> None:
        self.ranks = ranks
        self.schedule = schedule
        self.lock = threading.Lock()
        self._bytes: dict[tuple[str, int, int], BytesChannel] = {}
        self._tensors: dict[tuple[str, int, int], TensorChannel] = {}
        self._failed: int | None = None

    def switch(self, rank: int) -> None:
        """Called at the start of every call into `comm`."""
        if self.schedule is not None:
            self.schedule.switch(rank)
        elif self._failed is not None and self._failed != rank:
            raise PeerFailedError(f"rank {self._failed} failed")

    def fail(self, rank: int) -> None:
        """Make the other ranks' next calls raise."""
        if self._failed is None:
            self._failed = rank
        if self.schedule is not None:
            self.schedule.fail(rank)

    def post_bytes(self, kind: str, source: int, target: int, message: bytes) -> None:
        """A message leaves `source`."""
        with self.lock:
            channel = self._bytes.setdefault((kind, source, target), BytesChannel())
            channel.sent.append(bytes(message))
            self._settle(channel)

    def peek_bytes(self, kind: str, source: int, target: int) -> bool:
        """Whether a message has arrived."""
        with self.lock:
            channel = self._bytes.get((kind, source, target))
            return channel is not None and bool(channel.arrived)

    def take_bytes(self, kind: str, source: int, target: int) -> bytes:
        """The oldest message that has arrived."""
        with self.lock:
            return self._bytes[kind, source, target].arrived.popleft()

    def post_tensor(
        self, rank: int, peer: int, tensor: torch.Tensor, channel_number: int, *, send: bool
    ) -> Half:
        """One half of an exchange between `rank` and `peer`."""
        eager = self.schedule is None or self.schedule.random.random() < 0.5
        half = Half(peer, tensor, eager)
        kind = f"tensors on channel {channel_number}"
        key = (kind, rank, peer) if send else (kind, peer, rank)
        with self.lock:
            channel = self._tensors.setdefault(key, TensorChannel())
            if send:
                channel.sends.append(half)
            else:
                if self.schedule is not None:
                    half.data.fill_(POISON)  # MPI may write any time from here on
                channel.recvs.append(half)
            self._settle(channel)
        return half

    def events(self) -> list[Callable[[], None]]:
        """What could happen next."""
        channels: list[Channel] = [*self._bytes.values(), *self._tensors.values()]
        return [channel.event for channel in channels if channel.has_event()]

    def leftovers(self) -> list[str]:
        """Every message that nobody took, and every receive that nothing came for."""
        channels: dict[tuple[str, int, int], Channel] = {**self._bytes, **self._tensors}
        return [
            f"{channel.undelivered()} {kind} from rank {source} to rank {target}"
            for (kind, source, target), channel in channels.items()
            if channel.undelivered()
        ]

    def _settle(self, channel: Channel) -> None:
        if self.schedule is None:
            while channel.has_event():
                channel.event()
