"""One interleaving of ranks, chosen by a seed: a search for races and deadlocks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

from hpc_distkv.comm.waiter import StallError


class PeerFailedError(RuntimeError):
    """Another rank failed, so this one cannot go on."""


class SeededSchedule:
    """Lets one rank run at a time and chooses, at each call into `comm`, who goes on.

    The choice is among the ranks that could go on and the network, whose next event (a buffer is
    read, a message arrives) happens only when it is chosen. A rank is a thread that holds the
    baton or sleeps on its own semaphore; whoever holds the baton owns all state here, so there are
    no locks. The same seed gives the same run, if the ranks' own work is deterministic.

    A rank that polled in vain since the last event is blocked. When every live rank is blocked
    and the network has no event left, nothing can ever happen again: all of them raise StallError
    with the list of who waits for whom, without waiting for a timeout.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._turns: list[threading.Semaphore] = []
        self._live: set[int] = set()
        self._blocked: dict[int, Callable[[], str]] = {}
        self._unseen: set[int] = set()
        """Ranks that have not polled from start to end since the last event."""
        self._over: Exception | None = None
        self._events: Callable[[], Sequence[Callable[[], None]]] = tuple

    def begin(self, ranks: int, events: Callable[[], Sequence[Callable[[], None]]]) -> None:
        """Prepare a run of `ranks` threads; `events` lists what the network could do next."""
        self._turns = [threading.Semaphore(0) for _ in range(ranks)]
        self._live = set(range(ranks))
        self._unseen = set(self._live)
        self._events = events

    def start(self) -> None:
        """Give the baton to the first rank."""
        self._next()

    def join(self, rank: int) -> None:
        """First call of a rank's thread: wait for the baton."""
        self._turns[rank].acquire()

    def switch(self, rank: int) -> None:
        """Perhaps let others go on first. Outside a run, nothing."""
        if rank in self._live:
            self._next()
            self._turns[rank].acquire()
            self._go_on()

    def block(self, rank: int, waits: Callable[[], str]) -> None:
        """`rank` polled and found nothing: let others go on until something has happened."""
        if rank in self._unseen:
            self._unseen.remove(rank)  # something happened while it polled: let it look once more
        else:
            self._blocked[rank] = waits
        self.switch(rank)

    def finish(self, rank: int) -> None:
        """Last call of a rank's thread."""
        self._live.discard(rank)
        if self._live:
            self._next()

    def fail(self, rank: int) -> None:
        """`rank` has raised: let all others raise too when their turn comes."""
        self._over = self._over or PeerFailedError(f"rank {rank} failed")
        self._blocked.clear()

    def _go_on(self) -> None:
        if self._over is not None:
            raise self._over

    def _next(self) -> None:
        """Let network events happen until a rank is chosen, and give it the baton."""
        while True:
            ranks = sorted(self._live - self._blocked.keys())
            events = [] if self._over else self._events()
            choice = self.random.randrange(len(ranks) + bool(events)) if ranks or events else None
            if choice is None:
                self._deadlock()
            elif choice < len(ranks):
                self._turns[ranks[choice]].release()
                return
            else:
                self._happen(self.random.choice(events))
                self._blocked.clear()
                self._unseen = set(self._live)

    def _happen(self, event: Callable[[], None]) -> None:
        """A message that does not fit its receive is nobody's call: every rank raises it."""
        try:
            event()
        except Exception as error:
            self._over = error

    def _deadlock(self) -> None:
        waits = "; ".join(self._blocked[rank]() for rank in sorted(self._blocked))
        self._over = StallError(f"deadlock: {waits}")
        self._blocked.clear()
