"""Ranks that are threads of one process.

Nothing here blocks except `wait`, `take` and `Comm.idle`, so one thread can also drive all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from local_network import Half, Network
from seeded_schedule import PeerFailedError, SeededSchedule

from hpc_distkv.comm.transport import (
    TO_CREDITOR,
    Comm,
    Exchange,
    Mail,
    Pairs,
    Rounds,
    Transport,
    UnderWay,
)
from hpc_distkv.comm.waiter import Waiter
from hpc_distkv.comm.world import World

T = TypeVar("T")


def open_local(
    n: int,
    stall_timeout: float = 60.0,
    nodes: Sequence[int] | None = None,
    tp: int = 1,
    schedule: SeededSchedule | None = None,
) -> list[Comm]:
    """The ends of `n` connected ranks, by rank.

    `nodes` is the node number of every rank (all one node by default). With a schedule, drive them
    with `run_local`; messages then travel late and memory is read as late as MPI might.
    """
    network = Network(n, schedule)
    return [local_comm(network, rank, stall_timeout, nodes or [0] * n, tp) for rank in range(n)]


def local_comm(
    network: Network, rank: int, stall_timeout: float, nodes: Sequence[int], tp: int
) -> Comm:
    """One rank's end."""
    world = World(rank, tuple(nodes), tp)
    waiter = LocalWaiter(world, stall_timeout, network)
    return Comm(
        world,
        LocalTransport(network, waiter),
        LocalMail(network, waiter),
        LocalRounds(network, waiter),
        waiter,
        lambda status: network.fail(rank),
        lambda: LocalMail(network, waiter, "more mail"),
    )


def run_local(comms: Sequence[Comm], work: Callable[[Comm], T]) -> list[T]:
    """Run `work` for every rank in a thread of its own; the results by rank.

    If a rank raises, the others' next call into `comm` raises PeerFailedError, and the first
    rank's exception comes out here.
    """
    network = network_of(comms)
    schedule = network.schedule
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def body(comm: Comm) -> None:
        rank = comm.world.rank
        try:
            if schedule is not None:
                schedule.join(rank)
            results[rank] = work(comm)
        except BaseException as error:
            errors.append(error)
            network.fail(rank)
        finally:
            if schedule is not None:
                schedule.finish(rank)

    if schedule is not None:
        schedule.begin(len(comms), network.events)
    threads = [threading.Thread(target=body, args=(comm,), daemon=True) for comm in comms]
    for thread in threads:
        thread.start()
    if schedule is not None:
        schedule.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, PeerFailedError)):
        raise error
    return [results[rank] for rank in range(len(comms))]


def leftovers(comms: Sequence[Comm]) -> list[str]:
    """What was sent and never received, or awaited and never sent: [] after a clean run."""
    return network_of(comms).leftovers()


def network_of(comms: Sequence[Comm]) -> Network:
    """The network that connects these ranks."""
    waiter = comms[0].waiter
    assert isinstance(waiter, LocalWaiter)
    return waiter.network


class LocalWaiter(Waiter):
    """Waits like any other, or hands the baton on if there is a schedule."""

    def __init__(self, world: World, stall_timeout: float, network: Network) -> None:
        super().__init__(world, stall_timeout)
        self.network = network

    def pause(self, polls: int, quiet: float, waits: Callable[[], str]) -> None:
        """Let other ranks go on."""
        if self.network.schedule is not None:
            self.network.schedule.block(self.world.rank, waits)
        else:
            self.network.switch(self.world.rank)
            super().pause(polls, quiet, waits)


class LocalTransport(Transport):
    """Tensors between ranks of this process."""

    def __init__(self, network: Network, waiter: LocalWaiter) -> None:
        self._network = network
        self._rank = waiter.world.rank
        self._under_way = UnderWay(waiter)

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Exchange:
        """Post sends and receives."""
        self._network.switch(self._rank)
        post = partial(self._network.post_tensor, self._rank)
        halves = [post(*pair, receive_on, send=False) for pair in recvs]
        halves += [post(*pair, send_on, send=True) for pair in sends]
        return LocalExchange(self._network, self._under_way, halves)

    def drained(self) -> bool:
        """Whether all exchanges have completed."""
        self._network.switch(self._rank)
        return self._under_way.drained()


class LocalExchange(Exchange):
    """Sends and receives under way."""

    def __init__(self, network: Network, under_way: UnderWay, halves: list[Half]) -> None:
        super().__init__(under_way)
        self._network = network
        self._waiter = under_way.waiter
        self._left = halves

    @property
    def peers(self) -> list[int]:
        """Of what has not completed."""
        return [half.peer for half in self._left]

    def _push(self) -> bool:
        self._network.switch(self._waiter.world.rank)
        left = [half for half in self._left if not half.done]
        if len(left) < len(self._left):
            self._waiter.moved()
        self._left = left
        return not left


class LocalMail(Mail):
    """Mail between ranks of this process."""

    def __init__(self, network: Network, waiter: LocalWaiter, kind: str = "mail") -> None:
        """`kind`: what tells it from other mail."""
        self._network = network
        self._waiter = waiter
        self._kind = kind
        self._rank = waiter.world.rank

    def post(self, peer: int, message: bytes) -> None:
        """Send without waiting."""
        self._network.switch(self._rank)
        self._network.post_bytes(self._kind, self._rank, peer, message)

    def poll(self) -> tuple[int, bytes] | None:
        """The next message of anybody."""
        self._network.switch(self._rank)
        for peer in range(self._network.ranks):
            if self._network.peek_bytes(self._kind, peer, self._rank):
                self._waiter.moved()
                return peer, self._network.take_bytes(self._kind, peer, self._rank)
        return None


class LocalRounds(Rounds):
    """Control rounds as messages to and from rank 0."""

    def __init__(self, network: Network, waiter: LocalWaiter) -> None:
        self._network = network
        self._waiter = waiter
        self._rank = waiter.world.rank
        self._open = False
        self._gathered = False

    def report(self, message: bytes) -> None:
        """Begin a round."""
        assert not self._open, "report before the last round's answer was taken"
        self._network.switch(self._rank)
        self._open = True
        self._network.post_bytes("reports", self._rank, 0, message)

    def answer(self) -> bytes | None:
        """The answer, once."""
        self._network.switch(self._rank)
        if not self._open or not self._network.peek_bytes("answers", 0, self._rank):
            return None
        self._open = self._gathered = False
        self._waiter.moved()
        return self._network.take_bytes("answers", 0, self._rank)

    def reports(self) -> list[bytes] | None:
        """Rank 0: all reports, once, when the last has arrived."""
        self._network.switch(self._rank)
        if not self._open or self._gathered or self.awaited():
            return None
        self._gathered = True
        self._waiter.moved()
        return [self._network.take_bytes("reports", r, 0) for r in range(self._network.ranks)]

    def reply(self, messages: Sequence[bytes]) -> None:
        """Rank 0: answer all."""
        assert self._gathered, "reply without reports"
        self._network.switch(self._rank)
        for rank, message in enumerate(messages):
            self._network.post_bytes("answers", 0, rank, message)

    def awaited(self) -> list[int]:
        """Rank 0: who has not reported. Others: rank 0."""
        if not self._open or (self._rank == 0 and self._gathered):
            return []
        if self._rank:
            return [0]
        return [
            rank
            for rank in range(self._network.ranks)
            if not self._network.peek_bytes("reports", rank, 0)
        ]
