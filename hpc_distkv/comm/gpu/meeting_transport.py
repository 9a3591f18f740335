"""Tensors over a fabric: by appointment (`meetings`), and in hops within an instance.

Hops (`Transport.hop`) go without appointments, on a fabric of the instance's own that works on the
stream of what is computed, so the host runs ahead. Of two fabrics on one GPU NVIDIA says that
operations of one must be over before the other's begin, in the same order on all ranks: what waits
on a GPU for another rank holds processors and may hold up whole streams and calls of the host. So a
rank is in a meeting or in hops, never in both: it begins a meeting when its hops have passed, and
asks for a hop when it is in no meeting, and when none is left that it could begin. A recorded step
is replayed as if its hops were asked for one after another.

Why that never lasts for ever either. A hop that all ranks of the instance have asked for is over by
itself, as meetings are. All of them know that all have begun the step, and come to each of its hops
unless they are stuck (`group`). Suppose ranks are stuck: in a meeting as the lower side, or in hops
that not all have asked for, or before one of these. Take the highest instance I that has such
ranks, and of these one that has asked for the fewest hops and posted the fewest messages within I:
r. All its hops are asked for by everybody in I, so they pass. If r is in a meeting as the lower
side, with a rank of a higher instance, that one is not stuck, hence free at some time, and joins
before it does anything else; with a rank of I, that one has no hops left but such that r has asked
for too, and joins. Before r can ask for its next hop there are no more than a few meetings to
begin: debtors that wait for answers of all of I's ranks ask for no further layer meanwhile. So r
gets on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from hpc_distkv.comm.device import Recorded
from hpc_distkv.comm.gpu.fabric import Fabric, Message, Passage
from hpc_distkv.comm.gpu.meetings import Meetings, Post
from hpc_distkv.comm.transport import (
    TO_CREDITOR,
    Comm,
    Mail,
    Pairs,
    Pending,
    Transport,
    UnderWay,
)
from hpc_distkv.comm.waiter import Waiter


class MeetingTransport(Transport):
    """Moves tensors that a fabric holds by meetings and hops, and all others by a transport of the
    host."""

    def __init__(self, inner: Transport, fabric: Fabric, mail: Mail, waiter: Waiter) -> None:
        """`mail`: for this alone."""
        self._inner, self._fabric, self._mail, self._waiter = inner, fabric, mail, waiter
        self._meetings = Meetings(fabric, mail, waiter)
        self.under_way = UnderWay(waiter)
        self._within: Fabric | None = None
        """For hops."""
        self._others: list[int] = []
        """The other ranks of the instance."""
        self._recording = False
        """Whether hops are recorded, and not carried out."""
        self._recorded: WeakSet[Recorded] = WeakSet()
        """What has hops in it."""
        self._hop: Passage | None = None
        """The last one, until it has passed."""

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Pending:
        """Post one hop."""
        posts: list[Post] = []
        holds, unused = self._fabric.holds, self._fabric.mark()
        for pairs, channel, send in ((sends, send_on, True), (recvs, receive_on, False)):
            posts += [
                self._meetings.post(peer, channel, send, tensor, unused)
                for peer, tensor in pairs
                if holds(tensor)
            ]
        others = None
        if len(posts) < len(sends) + len(recvs):
            sends = [(peer, tensor) for peer, tensor in sends if not holds(tensor)]
            recvs = [(peer, tensor) for peer, tensor in recvs if not holds(tensor)]
            others = self._inner.exchange(sends, recvs, send_on, receive_on)
        self.push()
        return MeetingPending(posts, others, self)

    def push(self) -> None:
        """Do what can be done now."""
        self._meetings.look()
        if self._hop is not None and self._hop.over():
            self._hop = None
        if self._hop is None:
            self._meetings.begin()

    def drained(self) -> bool:
        """Whether all exchanges and hops have completed."""
        self.push()
        over = self.under_way.drained() and self._hop is None
        return over and self._mail.drained() and self._inner.drained()

    def close(self) -> None:
        """Close the fabrics, which waits for what was recorded of them to be forgotten."""
        for recorded in self._recorded:
            recorded.reset()
        for fabric in (self._within, self._fabric):
            if fabric is not None:
                fabric.close()
        self._inner.close()

    # -- hops -------------------------------------------------------------------------------------

    def unite(self, comm: Comm) -> None:
        """Give the ranks of this one's instance a fabric of their own."""
        self._within = self._fabric.within(comm)
        self._others = [rank for rank in comm.world.members if rank != comm.world.rank]

    @property
    def hops(self) -> bool:
        """Whether this rank's instance has a fabric."""
        return self._within is not None

    def hop(self, sends: Pairs, recvs: Pairs) -> bool:
        """Ask for a hop within the instance."""
        tensors = [tensor for _, tensor in (*sends, *recvs)]
        if self._within is None or not all(map(self._fabric.holds, tensors)):
            return False
        messages = [Message(peer, True, tensor) for peer, tensor in sends]
        messages += [Message(peer, False, tensor) for peer, tensor in recvs]
        if self._recording:
            self._within.ask(messages)
        else:
            self._await_meetings()
            self._hop = Passage(self._within, self._within.meet(messages), self._waiter)
        return True

    @contextmanager
    def recording(self, recorded: Recorded) -> Iterator[None]:
        """Nothing is polled in this block: events are not to be looked at meanwhile."""
        self._recording = True
        self._recorded.add(recorded)
        try:
            yield
        finally:
            self._recording = False

    def replay(self, recorded: Recorded) -> None:
        """As if its hops were asked for one after another."""
        assert self._within is not None
        self._await_meetings()
        recorded.replay()
        self._hop = Passage(self._within, self._within.mark(), self._waiter)

    def _await_meetings(self) -> None:
        self._waiter.until(lambda: self._may_hop or None, "messages to pass", self._held_by)

    def _held_by(self) -> list[int]:
        """Who keeps this rank's hops waiting."""
        return self._meetings.peers or self._others

    @property
    def _may_hop(self) -> bool:
        """Whether this rank is in no meeting, and could begin none if its hops had passed. While
        others wait for what it has posted it asks for one hop at a time, and for none before they
        can have what it has for them: so they wait for a hop, and not for a step."""
        self.push()
        if self._meetings.due or self._meetings.owes:
            return False
        return self._hop is None or not self._meetings.posted


class MeetingPending(Pending):
    """One hop under way."""

    def __init__(
        self, posts: list[Post], others: Pending | None, transport: MeetingTransport
    ) -> None:
        """`others`: what the host's transport carries of it."""
        super().__init__(transport.under_way)
        self._posts, self._others, self._transport = posts, others, transport

    @property
    def peers(self) -> list[int]:
        """Of what has not passed."""
        others = self._others.peers if self._others is not None else []
        return [post.flow.peer for post in self._posts if not post.done] + others

    def _push(self) -> bool:
        self._transport.push()
        if self._others is not None and self._others.done():
            self._others = None
        self._posts = [post for post in self._posts if not post.done]
        return not self._posts and self._others is None
