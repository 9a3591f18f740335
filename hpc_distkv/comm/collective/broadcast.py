"""Tensors from the first instance to all others, lane by lane."""

from __future__ import annotations

import torch

from hpc_distkv.comm.transport import Comm


class LaneBroadcast:
    """Hands tensors on from the lane's rank in instance 0 along a binomial tree: every rank
    receives once, and sends to those behind it at distances that are powers of two.

    Nobody waits for anybody behind its own children, and the n-th tensor of a rank is the n-th of
    its parent, so one tensor after another flows down the tree and none can wait for ever.
    """

    def __init__(self, comm: Comm) -> None:
        world = comm.world
        self._transport = comm.transport
        me, distance = world.instance, 1
        while distance < world.instances and not me & distance:
            distance *= 2
        self._parent = world.rank_of(me - distance) if me else None
        self._children = []
        while distance > 1:  # the most distant one first: it has the longest way to go on
            distance //= 2
            if me + distance < world.instances:
                self._children.append(world.rank_of(me + distance))

    @property
    def reads(self) -> bool:
        """Whether this rank is where tensors come from."""
        return self._parent is None

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The first instance's contiguous `tensor` to all, in place. Collective in the lane."""
        exchange, what = self._transport.exchange, "tensors of the first instance"
        if self._parent is not None:
            exchange([], [(self._parent, tensor)]).wait(what)
        exchange([(child, tensor) for child in self._children], []).wait(what)
