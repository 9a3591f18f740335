"""Rendezvous between GPUs: two ranks agree by mail before either asks NCCL for a message.

An NCCL send or receive occupies its stream until the other side has asked for its half, and all
operations of a communicator run in order. The engine's exchanges, though, are asynchronous: a
creditor takes part when it gets to it. If ranks asked NCCL for messages as soon as they post them,
three ranks could wait for each other in a ring, each for a message that stands behind another. So a
rank posts its half here, and two ranks then hold a meeting, in which both ask for all messages
between them that both are ready for:

    higher rank   posts; when its kernels up to the post have ended, mails Ready to the lower rank
    lower rank    posts; when its own kernels have ended, both are ready and it is in no meeting: it
                  mails Go to the higher rank and asks the fabric for the messages
    higher rank   reads Go and is in no meeting: it asks for the same messages in the same order
    both          the fabric reports that the messages have passed: the meeting is over

Order: a flow is all messages of one peer, channel and direction. A meeting takes the messages of a
flow in the order of their posts, on both sides, and goes through the flows in sorted order. Ready
and Go count messages, so neither side guesses what the other has posted.

Why no meeting lasts for ever. A rank is in one meeting at a time, so the messages it asks for are
at the head of its stream, and a meeting that both sides have joined ends by itself. Suppose some
meetings are never joined by their higher rank, and take the one whose higher rank h is the
greatest. h polls whenever it waits, so it does not join only because it is in another meeting for
ever, one that the other side never joins. Then h is the lower rank of that meeting, whose higher
rank is greater than h: a contradiction. (Locks taken in the order of ranks: Havender, 1968.)

Why every message that both sides have posted is met. Kernels end by themselves, as no stream but
the fabric's waits for another rank (for the exchanges that do, see `meeting_transport`); mail
arrives; and a lower rank that is in no meeting opens one with each of its peers in turn.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

import msgspec
import torch

from hpc_distkv.comm.device import Event
from hpc_distkv.comm.gpu.fabric import Fabric, Message, Passage
from hpc_distkv.comm.transport import Mail
from hpc_distkv.comm.waiter import Waiter


class Flow(NamedTuple):
    """The messages of one peer, channel and direction; both sides see them in one order."""

    peer: int
    channel: int
    upward: bool
    """From the lower rank to the higher one. (Of a rank with itself: the receives.)"""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """From the higher rank: it is ready for these messages (channel, upward, bytes)."""

    posts: list[tuple[int, bool, int]]


class Go(msgspec.Struct, frozen=True, array_like=True, tag="go"):
    """From the lower rank: it has begun a meeting over so many messages of these flows (channel,
    upward, messages)."""

    flows: list[tuple[int, bool, int]]


class Post:
    """One half of a message of this rank. It holds its tensor until the message has passed."""

    def __init__(self, flow: Flow, send: bool, tensor: torch.Tensor, unused: Event) -> None:
        self.flow, self.send = flow, send
        self.tensor: torch.Tensor | None = tensor
        self.nbytes = tensor.nbytes
        self.unused = unused
        """Passes when the kernels that were launched before the post have ended: the tensor may be
        sent, or overwritten."""

    @property
    def done(self) -> bool:
        """Whether the message has passed."""
        return self.tensor is None


class Meetings:
    """The appointments of one rank. Owner of what it has posted and what has not passed."""

    def __init__(self, fabric: Fabric, mail: Mail, waiter: Waiter) -> None:
        """`mail`: for this alone."""
        self._fabric, self._mail, self._waiter = fabric, mail, waiter
        self._me = waiter.world.rank
        self._posted: defaultdict[Flow, deque[Post]] = defaultdict(deque)
        """Kernels before the post may still use the tensor."""
        self._ready: defaultdict[Flow, deque[Post]] = defaultdict(deque)
        """Ready, and in no meeting yet."""
        self._theirs: defaultdict[Flow, deque[int]] = defaultdict(deque)
        """Bytes of what higher ranks are ready for."""
        self._called: deque[tuple[int, Go]] = deque()
        """Meetings that lower ranks have begun and this one has not joined."""
        self._meeting: tuple[Passage, list[Post]] | None = None
        self._turns: deque[int] = deque()
        """Peers in the order in which meetings are begun with them."""

    def post(
        self, peer: int, channel: int, send: bool, tensor: torch.Tensor, unused: Event
    ) -> Post:
        """Post one half of a message; see `Post`."""
        post = Post(Flow(peer, channel, send == (self._me < peer)), send, tensor, unused)
        self._posted[post.flow].append(post)
        return post

    def look(self) -> None:
        """Note what has become ready, here and at higher ranks, which meetings wait for this rank,
        and whether its own is over. Begins none."""
        self._note_ready()
        while (message := self._mail.poll()) is not None:
            self._read(*message)
        if self._meeting is not None and self._meeting[0].over():
            for post in self._meeting[1]:
                post.tensor = None
            self._meeting = None

    def begin(self) -> None:
        """Join a meeting that waits for this rank, or open one with the next peer that is ready.
        Does nothing while in a meeting."""
        if self._meeting is not None:
            return
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

    @property
    def peers(self) -> list[int]:
        """The peer of each message of the meeting that this rank is in."""
        return [post.flow.peer for post in self._meeting[1]] if self._meeting else []

    @property
    def due(self) -> bool:
        """Whether this rank is in a meeting, or could begin one."""
        return self._meeting is not None or bool(self._called) or self._could_open

    @property
    def posted(self) -> bool:
        """Whether this rank has posted messages that are in no meeting yet."""
        return bool(self._posted or self._ready)

    @property
    def owes(self) -> bool:
        """Whether a tensor that this rank sends is still in use by kernels before its post."""
        return any(post.send for posts in self._posted.values() for post in posts)

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

    def _read(self, peer: int, encoded: bytes) -> None:
        message: Ready | Go = msgspec.msgpack.decode(encoded, type=Ready | Go)
        if isinstance(message, Go):
            self._called.append((peer, message))
            return
        for channel, upward, nbytes in message.posts:
            self._theirs[Flow(peer, channel, upward)].append(nbytes)

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
        event = self._fabric.meet(messages)
        self._meeting = Passage(self._fabric, event, self._waiter), posts

    @property
    def _could_open(self) -> bool:
        """Whether this rank and a higher one, or itself, are both ready for a message."""
        for flow in self._ready:
            back = flow._replace(upward=not flow.upward)
            if self._theirs.get(flow) or (flow.peer == self._me and back in self._ready):
                return True
        return False
