"""Tensors of a device over a transport of the host: through buffers on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from hpc_distkv.comm.device import Event
from hpc_distkv.comm.transport import TO_CREDITOR, Exchange, Pairs, Transport, UnderWay
from hpc_distkv.comm.waiter import Waiter


class StagingCopies(Protocol):
    """Copies between a device and the host, beside what the device computes. Never block."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is on the device."""

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the host for as much. It is not used for anything else until nobody refers to
        it and the copies that were asked for have ended."""

    def mark(self) -> Event:
        """When all is done that the current stream was given."""

    def copy_out(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Event:
        """Device → host, after all that the current stream was given. Copies out end in the order
        in which they were asked for."""

    def copy_in(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Event
    ) -> Event:
        """Host → device after `after`, a mark; what is computed from now on comes later."""


class StagedTransport(Transport):
    """Moves tensors of a device by a transport for those of the host. The way of a tensor:

        exchange  copy to the host asked for             receive on the host posted
                  copy has ended: send posted            received: copy to the device asked for
        done      send complete                          what is computed from now on has it

    Why order is kept: receives are posted by `exchange`, sends by `push` strictly in the order of
    their exchanges: one whose copy has not ended holds up those behind it. So the order of posts on
    each channel is that of the calls of `exchange`, as it is without staging.

    Why nothing waits for ever: a copy to the host waits for kernels that were asked for before it,
    and these for copies of bytes that had arrived by then; so it ends, whatever others do, and the
    next poll of any exchange of this rank posts its send.

    Tensors of the host go along without copies.
    """

    def __init__(self, inner: Transport, copies: StagingCopies, waiter: Waiter) -> None:
        self._inner, self._copies = inner, copies
        self._unposted: deque[Departure] = deque()
        self.under_way = UnderWay(waiter)

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Exchange:
        """Post sends and receives."""
        arrival = Arrival(recvs, receive_on, self._inner, self._copies) if recvs else None
        departure = Departure(sends, send_on, self._copies) if sends else None
        if departure:
            self._unposted.append(departure)
        self.push()
        return StagedExchange(departure, arrival, self)

    def push(self) -> None:
        """Post every send whose turn it is."""
        while self._unposted and self._unposted[0].on_host:
            self._unposted.popleft().post(self._inner)

    def drained(self) -> bool:
        """Whether all exchanges have completed."""
        return self.under_way.drained() and self._inner.drained()


class Departure:
    """The sends of one exchange."""

    def __init__(self, sends: Pairs, channel: int, copies: StagingCopies) -> None:
        self._channel = channel
        self._sources = [tensor for _, tensor in sends if copies.holds(tensor)]
        staged = [copies.host_buffer(tensor) for tensor in self._sources]
        self._copied = copies.copy_out(self._sources, staged) if staged else None
        buffers = iter(staged)
        self._sends = [(peer, next(buffers) if copies.holds(t) else t) for peer, t in sends]
        self._pending: Exchange | None = None

    @property
    def peers(self) -> list[int]:
        """To whom it goes."""
        return [peer for peer, _ in self._sends]

    @property
    def on_host(self) -> bool:
        """Whether all of it is."""
        return self._copied is None or self._copied.query()

    def post(self, inner: Transport) -> None:
        """Send what is on the host."""
        self._sources.clear()
        self._pending = inner.exchange(self._sends, [], send_on=self._channel)

    def done(self) -> bool:
        """Whether all has left the host."""
        return self._pending is not None and self._pending.done()


class Arrival:
    """The receives of one exchange."""

    def __init__(self, recvs: Pairs, channel: int, inner: Transport, copies: StagingCopies) -> None:
        self._copies = copies
        self._targets = [tensor for _, tensor in recvs if copies.holds(tensor)]
        self._staged = [copies.host_buffer(tensor) for tensor in self._targets]
        buffers = iter(self._staged)
        pairs = [(peer, next(buffers) if copies.holds(t) else t) for peer, t in recvs]
        self._unused = copies.mark()
        """When nothing that was asked for so far uses the targets any more."""
        self.peers = [peer for peer, _ in recvs]
        self._pending: Exchange | None = inner.exchange([], pairs, receive_on=channel)

    def done(self) -> bool:
        """Whether all has arrived, as seen by what is computed from now on."""
        if self._pending is not None and self._pending.done():
            self._pending = None
            if self._staged:
                self._copies.copy_in(self._staged, self._targets, self._unused)
                self._staged.clear()
        return self._pending is None


class StagedExchange(Exchange):
    """Sends and receives under way."""

    def __init__(
        self, departure: Departure | None, arrival: Arrival | None, transport: StagedTransport
    ) -> None:
        super().__init__(transport.under_way)
        self._departure, self._arrival, self._transport = departure, arrival, transport

    @property
    def peers(self) -> list[int]:
        """Of what has not completed."""
        halves = (self._departure, self._arrival)
        return [peer for half in halves if half for peer in half.peers]

    def _push(self) -> bool:
        self._transport.push()
        if self._arrival and self._arrival.done():
            self._arrival = None
        if self._departure and self._departure.done():
            self._departure = None
        return not (self._arrival or self._departure)
