"""Tensors over a fabric whose two sides must ask for a message at the same time, as NCCL's must.

The engine's exchanges are asynchronous: a creditor takes part when it gets to it. But on such a
fabric what is asked for runs in order, on one stream, and stands there until the other side has
asked for it too. If ranks just asked for messages as they post them, three of them could wait for
each other in a ring, each for a message that stands behind another. So they meet by appointment:

    higher rank   posts → its kernels before are over → Ready to the lower one, by mail
    lower rank    posts → its kernels before are over → both are ready and it is in no meeting:
                  Go to the higher one, and asks for all messages that both are ready for
    higher rank   Go is there and it is in no meeting: asks for the same messages, in the same order
    both          the fabric says that they have passed: the meeting is over

Order: a meeting takes messages of a flow (peer, channel, direction) in the order of their posts, on
both sides, and goes through the flows in one order. Readiness of both is counted, never guessed.

Why no meeting lasts for ever. A rank is in one meeting at a time, so what it asks for stands at the
head of its stream, behind nothing. A meeting that both sides have asked for is over by itself.
Suppose some meeting is never asked for by its higher rank, and take the one of these whose higher
rank h is the greatest. h polls (whoever waits does), so it must be in another meeting for ever,
one that only the other side can be missing from: h is its lower rank, and its higher rank is
greater than h, against the choice. (Locks taken in the order of ranks: Havender, 1968.) And a
message that both sides have posted is met: kernels end by themselves, as no stream but the
fabric's waits for another rank (but for hops, see below); mail arrives; and a lower rank that is in
no meeting opens one, for its peers in turn.

Hops within an instance (`Transport.hop`) go without appointments, on a fabric of the instance's own
that works on the stream of what is computed, so the host runs ahead. Of two fabrics on one GPU
NVIDIA says that operations of one must be over before the other's begin, in the same order on all
ranks: what waits on a GPU for another rank holds processors and may hold up whole streams and calls
of the host. So a rank is in a meeting or in hops, never in both: it begins a meeting when its hops
have passed, and asks for a hop when it is in no meeting, and when none is left that it could begin.
A recorded step is replayed as if its hops were asked for one after another.

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

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from weakref import WeakSet

import msgspec
import torch

from hpc_distkv.comm.device import Event, Recorded
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

CHECK_SECONDS = 0.1
"""Between two looks at whether the fabric has failed."""


class Flow(NamedTuple):
    """Messages between this rank and a peer whose order counts."""

    peer: int
    channel: int
    upward: bool
    """From the lower rank to the higher one. (Of a rank with itself: the sends.)"""


class Message(NamedTuple):
    """One half of a message, as this rank asks the fabric for it."""

    peer: int
    send: bool
    tensor: torch.Tensor


class Fabric(Protocol):
    """Moves tensors of devices, if both sides ask for it. `meet` never waits for other ranks."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it moves this tensor."""

    def mark(self) -> Event:
        """When all is done that the current stream was given."""

    def meet(self, messages: Sequence[Message]) -> Event:
        """Ask for messages, all at once; the event passes when they have. The peers (of a meeting
        one) ask for the same ones in the same order."""

    def ask(self, messages: Sequence[Message]) -> None:
        """The same, without an event: of a stream that is recorded."""

    def within(self, comm: Comm) -> Fabric:
        """Another one, for hops between the ranks of this rank's instance, on the current stream.
        Collective over all ranks."""

    def check(self) -> None:
        """Raise if it has failed."""

    def close(self) -> None:
        """Give up the connections. Collective, when nothing is under way."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The sender, the higher rank, is ready for these messages: channel, upward, bytes."""

    posts: list[tuple[int, bool, int]]


class Go(msgspec.Struct, frozen=True, array_like=True, tag="go"):
    """The sender, the lower rank, has begun a meeting over so many messages of these flows:
    channel, upward, messages."""

    flows: list[tuple[int, bool, int]]


class Post:
    """One half of a message of this rank. It holds its tensor until the message has passed."""

    def __init__(self, flow: Flow, send: bool, tensor: torch.Tensor, unused: Event) -> None:
        self.flow, self.send = flow, send
        self.tensor: torch.Tensor | None = tensor
        self.nbytes = tensor.nbytes
        self.unused = unused
        """When no kernel that was asked for before the post uses the tensor."""

    @property
    def done(self) -> bool:
        """Whether the message has passed."""
        return self.tensor is None


class MeetingTransport(Transport):
    """Moves tensors that a fabric holds by meetings, and all others by a transport of the host."""

    def __init__(self, inner: Transport, fabric: Fabric, mail: Mail, waiter: Waiter) -> None:
        """`mail`: for this alone."""
        self._inner, self._fabric, self._mail, self._waiter = inner, fabric, mail, waiter
        self._me = waiter.world.rank
        self._posted: defaultdict[Flow, deque[Post]] = defaultdict(deque)
        """Not ready yet."""
        self._ready: defaultdict[Flow, deque[Post]] = defaultdict(deque)
        """In no meeting yet."""
        self._theirs: defaultdict[Flow, deque[int]] = defaultdict(deque)
        """Bytes of what higher ranks are ready for."""
        self._called: deque[tuple[int, Go]] = deque()
        """Meetings that lower ranks are in and wait for this one."""
        self._meeting: tuple[Event, list[Post]] | None = None
        self._within: Fabric | None = None
        """For hops."""
        self._recording = False
        """Whether hops are recorded, and not carried out."""
        self._recorded: WeakSet[Recorded] = WeakSet()
        """What has hops in it."""
        self._hop: Event | None = None
        """The last one, until it has passed."""
        self._others: list[int] = []
        """The other ranks of the instance."""
        self._turns: deque[int] = deque()
        """Peers in the order in which meetings are begun with them."""
        self.under_way = UnderWay(waiter)
        self._checked = 0.0

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Pending:
        """Post one hop."""
        posts: list[Post] = []
        holds, unused = self._fabric.holds, self._fabric.mark()
        for pairs, channel, send in ((sends, send_on, True), (recvs, receive_on, False)):
            for peer, tensor in pairs:
                if holds(tensor):
                    upward = send if peer == self._me else send == (self._me < peer)
                    post = Post(Flow(peer, channel, upward), send, tensor, unused)
                    self._posted[post.flow].append(post)
                    posts.append(post)
        others = None
        if len(posts) < len(sends) + len(recvs):
            sends = [(peer, tensor) for peer, tensor in sends if not holds(tensor)]
            recvs = [(peer, tensor) for peer, tensor in recvs if not holds(tensor)]
            others = self._inner.exchange(sends, recvs, send_on, receive_on)
        self.push()
        return MeetingPending(posts, others, self)

    def unite(self, comm: Comm) -> None:
        """Give the ranks of this one's instance a fabric of their own."""
        self._within = self._fabric.within(comm)
        self._others = [rank for rank in comm.world.members if rank != self._me]

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
            self._hop = self._within.meet(messages)
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
        self._hop = self._within.mark()

    def _await_meetings(self) -> None:
        self._waiter.until(lambda: self._may_hop or None, "messages to pass", self._held_by)

    def close(self) -> None:
        """Close the fabrics, which waits for what was recorded of them to be forgotten."""
        for recorded in self._recorded:
            recorded.reset()
        for fabric in (self._within, self._fabric):
            if fabric is not None:
                fabric.close()
        self._inner.close()

    def push(self) -> None:
        """Do what can be done now."""
        self._note_ready()
        while (letter := self._mail.poll()) is not None:
            self._read(*letter)
        if self._meeting is not None:
            self._end()
        if self._hop is not None:
            self._pass()
        if self._meeting is None and self._hop is None:
            self._begin()

    def drained(self) -> bool:
        """Whether all exchanges and hops have completed."""
        self.push()
        over = self.under_way.drained() and self._hop is None
        return over and self._mail.drained() and self._inner.drained()

    # -- appointments -----------------------------------------------------------------------------

    def _note_ready(self) -> None:
        """Tell lower ranks what this one has become ready for."""
        news: defaultdict[int, list[tuple[int, bool, int]]] = defaultdict(list)
        for flow, posts in list(self._posted.items()):
            while posts and posts[0].unused.query():
                post = posts.popleft()
                self._ready[flow].append(post)
                if flow.peer < self._me:
                    news[flow.peer].append((flow.channel, flow.upward, post.nbytes))
                elif flow.peer not in self._turns:
                    self._turns.append(flow.peer)
            if not posts:
                del self._posted[flow]
        for peer, ready in news.items():
            self._mail.post(peer, msgspec.msgpack.encode(Ready(ready)))

    def _read(self, peer: int, letter: bytes) -> None:
        message: Ready | Go = msgspec.msgpack.decode(letter, type=Ready | Go)
        if isinstance(message, Go):
            self._called.append((peer, message))
            return
        for channel, upward, nbytes in message.posts:
            self._theirs[Flow(peer, channel, upward)].append(nbytes)

    def _begin(self) -> None:
        """Join a meeting that waits for this rank, or open one with the next peer that is ready."""
        if self._called:
            self._meet(*self._called.popleft())
            return
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            peer = self._turns[-1]
            if flows := self._matched(peer):
                go = Go(flows)
                if peer != self._me:
                    self._mail.post(peer, msgspec.msgpack.encode(go))
                self._meet(peer, go)
                return

    def _matched(self, peer: int) -> list[tuple[int, bool, int]]:
        """The messages that this rank and a higher `peer` are both ready for, by flow."""
        flows = []
        for flow in sorted(flow for flow, posts in self._ready.items() if flow.peer == peer):
            mine, theirs = self._ready[flow], self._theirs[flow]
            if peer == self._me:
                other = self._ready.get(flow._replace(upward=not flow.upward), ())
                count = min(len(mine), len(other))
            else:
                count = min(len(mine), len(theirs))
                for post in list(mine)[:count]:
                    nbytes = theirs.popleft()
                    assert post.nbytes == nbytes, (
                        f"rank {peer} posted {nbytes} bytes where {post.nbytes} were expected"
                    )
            if count:
                flows.append((flow.channel, flow.upward, count))
        return flows

    def _meet(self, peer: int, go: Go) -> None:
        posts = []
        for channel, upward, count in go.flows:
            flow = Flow(peer, channel, upward)
            ready = self._ready[flow]
            posts += [ready.popleft() for _ in range(count)]
            if not ready:
                del self._ready[flow]
        messages = [Message(peer, p.send, p.tensor) for p in posts if p.tensor is not None]
        self._meeting = self._fabric.meet(messages), posts

    def _end(self) -> None:
        """See whether the meeting is over, and now and then whether it never will be."""
        assert self._meeting is not None
        passed, posts = self._meeting
        if passed.query():
            for post in posts:
                post.tensor = None
            self._meeting = None
            self._waiter.moved()
        else:
            self._check(self._fabric)

    def _pass(self) -> None:
        """See whether the hops are over, and now and then whether they never will be."""
        assert self._hop is not None
        assert self._within is not None
        if self._hop.query():
            self._hop = None
            self._waiter.moved()
        else:
            self._check(self._within)

    def _check(self, fabric: Fabric) -> None:
        if time.monotonic() > self._checked + CHECK_SECONDS:
            fabric.check()
            self._checked = time.monotonic()

    def _held_by(self) -> list[int]:
        """Who keeps this rank's hops waiting."""
        return [post.flow.peer for post in self._meeting[1]] if self._meeting else self._others

    @property
    def _may_hop(self) -> bool:
        """Whether this rank is in no meeting, and could begin none if its hops had passed. While
        others wait for what it has posted it asks for one hop at a time, and for none before they
        can have what it has for them: so they wait for a hop, and not for a step."""
        self.push()
        if self._meeting is not None or self._called or self._could_open:
            return False
        posted = [post for posts in self._posted.values() for post in posts]
        owed = any(post.send for post in posted)
        return not owed and (self._hop is None or not (posted or self._ready))

    @property
    def _could_open(self) -> bool:
        """Whether this rank and a higher one, or itself, are both ready for a message."""
        for flow in self._ready:
            back = flow._replace(upward=not flow.upward)
            if self._theirs.get(flow) or (flow.peer == self._me and back in self._ready):
                return True
        return False


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
