"""A fabric for tests that moves messages only when both sides have asked for the same ones, ends
everything late, and records what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from local_ranks import network_of

from hpc_distkv.comm.gpu.fabric import Message
from hpc_distkv.comm.gpu.meeting_transport import MeetingTransport
from hpc_distkv.comm.transport import Comm


class Late:
    def __init__(self) -> None:
        self.past = False

    def query(self) -> bool:
        return self.past


class Asked:
    """What a rank's stream stands at."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = list(messages)
        self.event = Late()


class RecordedFabric:
    """One for all ranks; each has an end of it."""

    def __init__(self, ranks: int) -> None:
        self.heads: list[Asked | None] = [None] * ranks
        self.marks: list[list[Late]] = [[] for _ in range(ranks)]
        self.meetings: list[tuple[int, int, int]] = []
        """(rank, peer, messages) in the order in which they were asked for."""
        self.hops: list[tuple[int, ...]] = []
        """The ranks of each that all of them have asked for."""
        self.asked: dict[int, list[Sequence[Message]]] = {rank: [] for rank in range(ranks)}
        """Hops that not all ranks of the instance have asked for."""
        self.tails: list[list[Late]] = [[] for _ in range(ranks)]
        """Hops that have moved their bytes and have not passed."""
        self.closed: list[int] = []
        self.failure: Exception | None = None

    def ask(self, rank: int, messages: Sequence[Message]) -> Late:
        assert self.heads[rank] is None, "a message would stand behind another"
        assert not self.asked[rank], "two fabrics at once"
        assert not self.tails[rank], "two fabrics at once"
        peers = {message.peer for message in messages}
        assert len(peers) == 1, "a meeting has two sides"
        self.heads[rank] = asked = Asked(messages)
        self.meetings.append((rank, *peers, len(messages)))
        return asked.event

    def events(self) -> list[Callable[[], None]]:
        """What could happen next: kernels end, in order; both sides of a meeting are there."""
        queues = [queue for queue in (*self.marks, *self.tails) if queue]
        found = [lambda queue=queue: self.pass_mark(queue) for queue in queues]
        for rank, asked in enumerate(self.heads):
            peer = asked.messages[0].peer if asked else -1
            theirs = self.heads[peer] if asked else None
            if theirs is not None and rank <= peer and theirs.messages[0].peer == rank:
                found.append(lambda rank=rank, peer=peer: self.meet(rank, peer))
        return found

    def pass_mark(self, marks: list[Late]) -> None:
        marks.pop(0).past = True

    def hop(self, comm: Comm, messages: Sequence[Message]) -> None:
        """The host stands still until all ranks of the instance have asked for the hop, as it may
        in any call that waits for the GPU; it serves nobody meanwhile."""
        rank, ranks = comm.world.rank, comm.world.members
        assert self.heads[rank] is None, "two fabrics at once"
        own = self.asked[rank]
        own.append(messages)
        while own and not all(self.asked[other] for other in ranks):
            comm.waiter.pause(0, 0.0, lambda: f"rank {rank} stands still in a hop")
        if own:  # the first that sees all of them
            self.move({other: self.asked[other].pop() for other in ranks})
            self.hops.append(tuple(ranks))
            self.marks[rank].append(Late())  # an event, so that those that stand still look again

    def move(self, hop: dict[int, Sequence[Message]]) -> None:
        """Every send of a hop meets its receive."""
        recvs = {
            (peer, rank): t for rank, each in hop.items() for peer, send, t in each if not send
        }
        sends = {(rank, peer): t for rank, each in hop.items() for peer, send, t in each if send}
        assert sends.keys() == recvs.keys()
        for pair, source in sends.items():
            assert source.nbytes == recvs[pair].nbytes
            recvs[pair].copy_(source)

    def meet(self, low: int, high: int) -> None:
        ours, theirs = self.heads[low], self.heads[high]
        assert ours is not None
        assert theirs is not None
        if low == high:
            sends = [m.tensor for m in ours.messages if m.send]
            recvs = [m.tensor for m in ours.messages if not m.send]
            pairs = list(zip(sends, recvs, strict=True))
        else:
            assert [m.send for m in ours.messages] == [not m.send for m in theirs.messages]
            pairs = [
                (a.tensor, b.tensor) if a.send else (b.tensor, a.tensor)
                for a, b in zip(ours.messages, theirs.messages, strict=True)
            ]
        for source, target in pairs:
            assert source.nbytes == target.nbytes
            target.copy_(source)
        self.heads[low] = self.heads[high] = None
        ours.event.past = theirs.event.past = True


class End:
    """One rank's end."""

    def __init__(self, fabric: RecordedFabric, rank: int) -> None:
        self.fabric, self.rank = fabric, rank

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype != torch.int16  # some stay with the host

    def mark(self) -> Late:
        event = Late()
        self.fabric.marks[self.rank].append(event)
        return event

    def meet(self, messages: Sequence[Message]) -> Late:
        assert all(self.holds(message.tensor) for message in messages)
        return self.fabric.ask(self.rank, messages)

    def within(self, comm: Comm) -> Inside:
        return Inside(self.fabric, comm)

    def close(self) -> None:
        self.fabric.closed.append(self.rank)

    def check(self) -> None:
        if self.fabric.failure:
            raise self.fabric.failure


class Inside(End):
    """One rank's end of its instance's own fabric."""

    def __init__(self, fabric: RecordedFabric, comm: Comm) -> None:
        super().__init__(fabric, comm.world.rank)
        self.comm = comm

    def meet(self, messages: Sequence[Message]) -> Late:
        self.ask(messages)
        return self.mark()

    def ask(self, messages: Sequence[Message]) -> None:
        assert all(self.holds(message.tensor) for message in messages)
        self.fabric.hop(self.comm, messages)

    def mark(self) -> Late:
        event = Late()
        self.fabric.tails[self.rank].append(event)
        return event


def connect(comms: Sequence[Comm]) -> RecordedFabric:
    """Let the tensors of all ranks go by meetings; when anything ends is up to the schedule of
    their network."""
    network = network_of(comms)
    fabric = RecordedFabric(len(comms))
    for comm in comms:
        end = End(fabric, comm.world.rank)
        transport = MeetingTransport(comm.transport, end, comm.new_mail(), comm.waiter)
        comm.transport = transport
        comm.waiter.always(transport.push)
    events = network.events
    network.events = lambda: [*events(), *fabric.events()]
    return fabric
