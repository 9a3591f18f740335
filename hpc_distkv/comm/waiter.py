"""The one way in which a rank waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from hpc_distkv.comm.world import World
from hpc_distkv.errors import FaultError

T = TypeVar("T")

YIELDS = 50
"""Polls that only offer the core to others, before sleeping begins: about as many microseconds."""
OWN_CORE_SECONDS = 2e-3
"""How long they go on where every rank of the node has a core to itself: longer than a layer of a
decode step, since to wake from a sleep costs about as much as a whole exchange."""
SHORTEST_SLEEP, LONGEST_SLEEP = 50e-6, 1e-3
SLEEP_SHARE = 1 / 20
"""A sleep lasts this share of the wait so far, so sleeping never delays a wait by much more."""
PATIENCE = 12
"""How many times the stall timeout others may take to get ready (`Waiter.patient`)."""
LONGEST_GAP = 1.0
"""Seconds that one gap between two polls may add to the stall clock: a job that Slurm or a
debugger suspended for an hour has not stalled for an hour."""


class StallError(FaultError):
    """A wait made no progress for the stall timeout; the text says who waits for whom."""

    def __init__(self, text: str, awaited: Iterable[int] = ()) -> None:
        super().__init__(text)
        self.awaited = tuple(awaited)
        """Ranks."""


class StallClock:
    """Seconds in which nothing moved, as far as this process ran to see it."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Something moved."""
        self.quiet, self._last = 0.0, time.monotonic()

    def look(self) -> float:
        """Seconds since the last move; to be called often."""
        now = time.monotonic()
        self.quiet += min(now - self._last, LONGEST_GAP)
        self._last = now
        return self.quiet


def eagerness(world: World) -> float:
    """Seconds for which a waiting rank may keep its core busy: none where ranks share cores."""
    return OWN_CORE_SECONDS if world.cores >= 1 else 0.0


def nobody() -> Iterable[int]:
    """The ranks awaited by a wait that does not know."""
    return ()


class Waiter:
    """Polls until something is there, politely, and gives up when nothing moves for too long.

    A blocking MPI call would spin on a core that another rank may need, and would keep Python's
    signal handlers from running; polls with yields and sleeps in between do neither.
    """

    def __init__(self, world: World, stall_timeout: float, eager: float = 0.0) -> None:
        """`eager`: seconds of polling before sleeping begins, where the core is free anyway."""
        self.world = world
        self.stall_timeout = stall_timeout
        self._eager = eager
        self._background: list[Callable[[], object]] = []
        self._moves = 0

    def always(self, *pushes: Callable[[], object]) -> None:
        """Have `pushes` called at every poll of all waits from now on: what they push on must
        advance while this rank waits for something else."""
        self._background += pushes

    def poll_for(self, eager: float) -> None:
        """From now on waits poll for `eager` seconds before they sleep."""
        self._eager = eager

    @contextmanager
    def meanwhile(self, push: Callable[[], object]) -> Iterator[None]:
        """Have `push` called at every poll of all waits in this block."""
        self._background.append(push)
        try:
            yield
        finally:
            self._background.remove(push)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Waits in this block are for ranks that do what may take some of them much longer than
        others, as to read weights: they give up later."""
        hurried, self.stall_timeout = self.stall_timeout, PATIENCE * self.stall_timeout
        try:
            yield
        finally:
            self.stall_timeout = hurried

    def moved(self) -> None:
        """Something of this rank completed: the stall clock starts anew."""
        self._moves += 1

    def until(
        self,
        ready: Callable[[], T | None],
        what: str,
        awaited: Callable[[], Iterable[int]] = nobody,
    ) -> T:
        """The first value of `ready` that is not None.

        Raises StallError, naming `what` and the ranks in `awaited`, if nothing of this rank
        completed for the stall timeout.
        """
        if (value := ready()) is not None:
            return value
        polls, seen, clock = 0, self._moves, StallClock()
        while True:
            for push in self._background:
                push()
            if (value := ready()) is not None:
                return value
            if self._moves != seen:
                polls, seen = 0, self._moves
                clock.restart()
            if clock.look() > self.stall_timeout:
                raise self.stall(what, awaited)
            self.pause(polls, clock.quiet, lambda: self.waits(what, awaited))
            polls += 1

    def stall(self, what: str, awaited: Callable[[], Iterable[int]]) -> StallError:
        """The error of a wait in which nothing moved for too long."""
        text = f"{self.waits(what, awaited)}: nothing moved for {self.stall_timeout:g} s"
        return StallError(text, awaited())

    def waits(self, what: str, awaited: Callable[[], Iterable[int]]) -> str:
        """Who waits for whom."""
        names = ", ".join(self.world.name(rank) for rank in sorted(set(awaited())))
        return f"{self.world.name(self.world.rank)} waits for {names + ': ' if names else ''}{what}"

    def pause(self, polls: int, quiet: float, waits: Callable[[], str]) -> None:
        """Leave the core to others after the `polls`-th poll, `quiet` seconds into the wait."""
        if polls < YIELDS or quiet < self._eager:
            os.sched_yield()
        else:
            time.sleep(min(max(quiet * SLEEP_SHARE, SHORTEST_SLEEP), LONGEST_SLEEP))
