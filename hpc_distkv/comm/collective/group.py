"""The lanes of one instance as one: sums of their tensors, and their tensors side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import torch

from hpc_distkv.comm.device import Recorded
from hpc_distkv.comm.transport import WITHIN, Comm, Pairs, StreamOrdered

DIRECT_BYTES = 32 << 10
"""Tensors up to this size go to all lanes at once: one exchange instead of two, (lanes - 1) times
the bytes instead of 2 · (lanes - 1) / lanes times."""


class Group:
    """Collectives between the lanes, the ranks of this rank's instance, made of sends and receives:
    whatever carries tensors carries them.

    Every sum is made in float32 in the order of the lanes: all lanes hold the same bits, whatever
    the size, and so does every repetition. (A reduction of the fabric's own would add up bfloat16
    in bfloat16, and in another order for other sizes.)

    Exchanges go one of two ways, and all lanes choose the same. In steps that wait for other
    instances (those with loans) they go as all other tensors do, on a channel of their own, and the
    host waits. In independent steps the hosts first tell each other that they begin: from then on
    every lane comes to the end of the step whatever happens elsewhere. So exchanges are enqueued on
    the compute stream (`comm.transport.StreamOrdered`), where the transport can, and may be part of
    a captured step.

    Why no wait lasts for ever: the lanes of an instance take the same steps in the same order
    (`ranks.follower`), so the n-th call of each is the same collective; all its sends and receives
    are posted before any is awaited; and whoever waits goes on serving its debtors, since it waits
    with the `Waiter`. So a lane waits only for lanes that are still on their way to the same call.
    For stream-ordered exchanges see `comm.gpu.meeting_transport`.
    """

    def __init__(self, comm: Comm) -> None:
        """Once instances are formed and tensors have their way (`Transport.unite`)."""
        self._comm, world = comm, comm.world
        self._transport = comm.transport
        self._lane, self._ranks = world.lane, world.members
        self._others = [rank for rank in self._ranks if rank != world.rank]
        self._calls = 0
        self._stream_ordered: StreamOrdered | None = None
        """In a step whose exchanges no host waits for."""

    def rehearsal(self) -> Group:
        """One that takes the same memory, and exchanges nothing with anybody."""
        return Rehearsal(self._comm)

    def begin(self, independent: bool) -> None:
        """A step begins; `independent`: all lanes come to its end whatever becomes of other
        instances."""
        self._stream_ordered = self._transport.stream_ordered if independent else None
        if self._stream_ordered:
            here, *there = torch.zeros((len(self._ranks), 1), dtype=torch.int16)  # on the host
            begun = list(zip(self._others, there, strict=True))
            self._wait([(rank, here) for rank in self._others], begun)

    @property
    def alone(self) -> bool:
        """Never."""
        return False

    @property
    def recordable(self) -> bool:
        """Whether no host waits in independent steps."""
        return self._transport.stream_ordered is not None

    def recording(self, recorded: Recorded) -> AbstractContextManager[object]:
        """As `StreamOrdered.recording`, in an independent step."""
        assert self._stream_ordered
        return self._stream_ordered.recording(recorded)

    def replay(self, recorded: Recorded) -> None:
        """As `StreamOrdered.replay`, in an independent step."""
        assert self._stream_ordered
        self._stream_ordered.replay(recorded)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Lane 0's `x` (contiguous, of one shape and dtype) on all lanes, in place."""
        if self._lane:
            self._exchange([], [(self._ranks[0], x)])
        else:
            self._exchange([(rank, x) for rank in self._others], [])
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all lanes' `x` (contiguous, of one shape and dtype), in place."""
        flat = x.view(-1)
        if x.nbytes <= DIRECT_BYTES:
            self._sum_direct(flat)
        else:
            self._sum_in_shares(flat)
        return x

    def joined(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """On lane 0 the lanes' parts `[rows, widths[lane]]` side by side; elsewhere `part` as it
        is."""
        if self._lane:
            self._exchange([(self._ranks[0], part.contiguous())], [])
            return part
        parts = [part, *(part.new_empty((len(part), width)) for width in widths[1:])]
        self._exchange([], list(zip(self._others, parts[1:], strict=True)))
        return torch.cat(parts, dim=1)

    def _sum_direct(self, x: torch.Tensor) -> None:
        """Everybody gets everything and sums by itself."""
        others = x.new_empty((len(self._others), len(x)))
        self._exchange(
            [(rank, x) for rank in self._others], list(zip(self._others, others, strict=True))
        )
        self._sum(x, others, x)

    def _sum_in_shares(self, x: torch.Tensor) -> None:
        """Every lane sums a share of the elements and gives the sums to the others."""
        lanes = len(self._ranks)
        edges = [len(x) * lane // lanes for lane in range(lanes + 1)]
        shares = {rank: x[a:b] for rank, (a, b) in zip(self._ranks, pairwise(edges), strict=True)}
        mine = shares.pop(self._ranks[self._lane])
        others = mine.new_empty((lanes - 1, len(mine)))
        self._exchange(list(shares.items()), list(zip(self._others, others, strict=True)))
        self._sum(mine, others, mine)
        self._exchange([(rank, mine) for rank in self._others], list(shares.items()))

    def _sum(self, own: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
        """Add up in the order of the lanes."""
        parts = [*others[: self._lane], own, *others[self._lane :]]
        total = parts[0].to(torch.float32, copy=True)
        for part in parts[1:]:
            total += part
        out.copy_(total)

    def _exchange(self, sends: Pairs, recvs: Pairs) -> None:
        if not (self._stream_ordered and self._stream_ordered.exchange(sends, recvs)):
            self._wait(sends, recvs)

    def _wait(self, sends: Pairs, recvs: Pairs) -> None:
        self._calls += 1
        pending = self._transport.exchange(sends, recvs, WITHIN, WITHIN)
        pending.wait(f"exchange {self._calls} between the ranks of an instance")


class Rehearsal(Group):
    """See `Group.rehearsal`."""

    def _wait(self, sends: Pairs, recvs: Pairs) -> None:
        """For nobody."""

    def _exchange(self, sends: Pairs, recvs: Pairs) -> None:
        """Nothing."""
