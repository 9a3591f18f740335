"""Tensors of GPUs over a fabric: by meetings (`meetings`), and within an instance stream-ordered
too (`comm.transport.StreamOrdered`).

Stream-ordered exchanges need no appointment. They go over a fabric of the instance's own, on the
compute stream, so the host runs ahead of them. NVIDIA demands of two communicators on one GPU that
the operations of one are over before those of the other begin, in the same order on all ranks: an
operation that waits for another rank holds multiprocessors, and may hold up whole streams and calls
of the host. So a rank is in a meeting or in stream-ordered exchanges, never in both:

* it begins a meeting only when its stream-ordered exchanges have completed;
* it enqueues a stream-ordered exchange only when it is in no meeting and could begin none. While
  others wait for tensors that it has posted, it enqueues one at a time, so that they wait for one
  exchange and not for a step.

Replaying a captured step counts as enqueueing its exchanges one after another.

Why no rank waits for ever (call the stream-ordered exchanges hops). A hop that all ranks of the
instance have enqueued completes by itself, and so does a meeting that both sides have joined. All
ranks of an instance know that all of them have begun the step (`Group.begin`), so they come to each
of its hops unless they are stuck: in a meeting as the lower side, in hops that not all have
enqueued, or before one of these. Suppose some ranks are stuck. Take the highest instance I that has
such ranks, and of these a rank r that has enqueued the fewest hops and posted the fewest messages
within I. Every rank of I has enqueued all hops of r, so they complete. If r is in a meeting as the
lower side, the higher side joins: if it belongs to a higher instance it is not stuck, so it is free
at some time, and joins before it does anything else; if it belongs to I it has no hops left but
those of r, and joins. Before r can enqueue its next hop there are only a few meetings to begin,
since debtors that wait for answers of all ranks of I ask for no further layer meanwhile. So r gets
on, against the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from hpc_distkv.comm.device import Recorded
from hpc_distkv.comm.gpu.fabric import Fabric, Message, Passage
from hpc_distkv.comm.gpu.meetings import Meetings, Post
from hpc_distkv.comm.transport import (
    TO_CREDITOR,
    Comm,
    Exchange,
    Mail,
    Pairs,
    Transport,
    UnderWay,
)
from hpc_distkv.comm.waiter import Waiter


class MeetingTransport(Transport):
    """Moves the tensors that a fabric holds by meetings or stream-ordered, and all others by a
    transport of the host."""

    stream_ordered: InstanceExchanges | None = None

    def __init__(self, inner: Transport, fabric: Fabric, mail: Mail, waiter: Waiter) -> None:
        """`mail`: for this alone."""
        self._inner, self._fabric, self._mail, self._waiter = inner, fabric, mail, waiter
        self._meetings = Meetings(fabric, mail, waiter)
        self.under_way = UnderWay(waiter)

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Exchange:
        """Post sends and receives."""
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
        return MeetingExchange(posts, others, self)

    def unite(self, comm: Comm) -> None:
        """Give the ranks of this one's instance a fabric of their own."""
        self.stream_ordered = InstanceExchanges(
            comm, self._fabric.within(comm), self._meetings, self.push
        )

    def push(self) -> None:
        """Do what can be done now."""
        self._meetings.look()
        if self.stream_ordered is None or self.stream_ordered.completed():
            self._meetings.begin()

    def drained(self) -> bool:
        """Whether all exchanges have completed."""
        self.push()
        over = self.under_way.drained() and (
            self.stream_ordered is None or self.stream_ordered.completed()
        )
        return over and self._mail.drained() and self._inner.drained()

    def close(self) -> None:
        """Close the fabrics."""
        if self.stream_ordered is not None:
            self.stream_ordered.close()
        self._fabric.close()
        self._inner.close()


class InstanceExchanges:
    """The stream-ordered exchanges of one rank. Owner of the instance's fabric."""

    def __init__(
        self, comm: Comm, fabric: Fabric, meetings: Meetings, push: Callable[[], None]
    ) -> None:
        """`push`: of the transport that takes turns with this one."""
        self._waiter, self._fabric, self._meetings, self._push = comm.waiter, fabric, meetings, push
        self._others = [rank for rank in comm.world.members if rank != comm.world.rank]
        self._recording = False
        self._recorded: WeakSet[Recorded] = WeakSet()
        """The captured graphs that have exchanges in them."""
        self._last: Passage | None = None
        """The last exchange, until it has completed."""

    def exchange(self, sends: Pairs, recvs: Pairs) -> bool:
        """Enqueue sends and receives."""
        if not all(self._fabric.holds(tensor) for _, tensor in (*sends, *recvs)):
            return False
        messages = [Message(peer, True, tensor) for peer, tensor in sends]
        messages += [Message(peer, False, tensor) for peer, tensor in recvs]
        if self._recording:
            self._fabric.ask(messages)
        else:
            self._await_meetings()
            self._last = Passage(self._fabric, self._fabric.meet(messages), self._waiter)
        return True

    @contextmanager
    def recording(self, recorded: Recorded) -> Iterator[None]:
        """Nothing is polled in this block: a captured stream has no events to look at."""
        self._recording = True
        self._recorded.add(recorded)
        try:
            yield
        finally:
            self._recording = False

    def replay(self, recorded: Recorded) -> None:
        """Enqueue all that was captured."""
        self._await_meetings()
        recorded.replay()
        self._last = Passage(self._fabric, self._fabric.mark(), self._waiter)

    def completed(self) -> bool:
        """Whether all exchanges have completed. Never blocks."""
        if self._last is not None and self._last.over():
            self._last = None
        return self._last is None

    def close(self) -> None:
        """Forget what was captured, and close the fabric, which waits for that."""
        for recorded in self._recorded:
            recorded.reset()
        self._fabric.close()

    def _await_meetings(self) -> None:
        self._waiter.until(lambda: self._may_enqueue or None, "messages to pass", self._held_by)

    def _held_by(self) -> list[int]:
        """The ranks that keep this one's exchanges waiting."""
        return self._meetings.peers or self._others

    @property
    def _may_enqueue(self) -> bool:
        """Whether this rank is in no meeting, could begin none, and has what it has posted for
        others ready; and, while something posted is in no meeting yet, the last exchange has
        completed."""
        self._push()
        if self._meetings.due or self._meetings.owes:
            return False
        return self._last is None or not self._meetings.posted


class MeetingExchange(Exchange):
    """Sends and receives under way."""

    def __init__(
        self, posts: list[Post], others: Exchange | None, transport: MeetingTransport
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
