"""The lanes of one instance as one: sums of their tensors, and their tensors side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from hpc_distkv.comm.transport import WITHIN, Comm, Pairs

DIRECT_BYTES = 32 << 10
"""Tensors up to this size go to all lanes at once: one hop instead of two, (lanes - 1) times the
bytes instead of 2 · (lanes - 1) / lanes times."""


class Group:
    """Collectives between the ranks of this rank's instance, made of hops from point to point, so
    whatever carries tensors carries them.

    Every sum is made in float32 in the order of the lanes: all lanes hold the same bits, whatever
    the size, and so does every repetition. (A reduction of the fabric's own would add up bfloat16
    in bfloat16, and in another order for other sizes.)

    Hops go one of two ways, and all lanes choose the same. In steps that wait for other instances
    (those with loans) they go as all other tensors do, on a channel of their own, and the host
    waits. In other steps only the first sum does: then every lane has begun the step, and comes to
    its end whatever happens elsewhere. So from there on hops are ordered with what is computed
    (`Transport.hop`), where the transport has a way for that, and no host waits.

    Why no wait lasts for ever: the lanes of an instance take the same steps in the same order
    (`engine.follower`), so the n-th call of each is the same collective; all its sends and receives
    are posted before any is awaited; and whoever waits goes on serving its debtors, since it waits
    with the `Waiter`. So a lane waits only for lanes that are still on their way to the same call.
    For hops whose host does not wait see `meetings`.
    """

    def __init__(self, comm: Comm) -> None:
        """Once instances are formed and tensors have their way (`Transport.unite`)."""
        world = comm.world
        self._transport = comm.transport
        self._lane, self._ranks = world.lane, world.lanes
        self._others = [rank for rank in self._ranks if rank != world.rank]
        self._calls = 0
        self._apart = self._begun = False
        self._room = torch.empty(0, dtype=torch.uint8)
        """For what is received; it grows to the largest tensor and stays."""

    def rehearsal(self) -> Group:
        """One that takes the same memory, and exchanges nothing with anybody."""
        return Rehearsal(self)

    def begin(self, apart: bool) -> None:
        """A step begins; `apart`: all lanes come to its end whatever becomes of other instances."""
        self._apart, self._begun = apart, False

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Lane 0's `x` (contiguous, of one shape and dtype) on all lanes, in place. The host waits:
        it comes first in a step, and shows no lane that all others have begun it."""
        if self._lane:
            self._wait([], [(self._ranks[0], x)])
        else:
            self._wait([(rank, x) for rank in self._others], [])
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
        others = self._rows(x, len(self._others))
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
        others = self._rows(mine, lanes - 1)
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

    def _rows(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """Room for `count` tensors like a flat one."""
        needed = count * like.nbytes
        if self._room.nbytes < needed:
            self._room = torch.empty(needed, dtype=torch.uint8, device=like.device)
        return self._room[:needed].view(like.dtype).view(count, len(like))

    def _exchange(self, sends: Pairs, recvs: Pairs) -> None:
        if self._apart and self._begun and self._transport.hop(sends, recvs):
            return
        self._wait(sends, recvs)
        self._begun = True

    def _wait(self, sends: Pairs, recvs: Pairs) -> None:
        self._calls += 1
        pending = self._transport.exchange(sends, recvs, WITHIN, WITHIN)
        pending.wait(f"hop {self._calls} between the ranks of an instance")


class Rehearsal(Group):
    """See `Group.rehearsal`."""

    def __init__(self, group: Group) -> None:
        self.__dict__ |= group.__dict__
        self._room = torch.empty(0, dtype=torch.uint8)

    def _exchange(self, sends: Pairs, recvs: Pairs) -> None:
        """Nothing."""
