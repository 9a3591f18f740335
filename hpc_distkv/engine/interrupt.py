"""A run that has to end before all rows are answered."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import NamedTuple

GRACE = 15.0
"""Seconds that what runs has to finish, unless told otherwise."""
TERM_GRACE = 10.0
"""Seconds at most after SIGTERM: Slurm kills 30 s after it (KillWait), and the results have to be
on the disk by then."""
DRAIN, HALT = b"drain", b"halt"


class Asked(NamedTuple):
    """That a rank was asked to stop."""

    by: str
    """The name of the signal."""
    grace: float
    """Seconds it was given."""


class Interrupt:
    """When one rank was asked to stop, and until when it may go on with what it has begun.

    A signal only sets the deadline; what the rank wants goes into its next report, so that all
    ranks stop in the same control round. Further signals may bring the deadline forward.
    """

    def __init__(self, grace: float = GRACE, clock: Callable[[], float] = time.monotonic) -> None:
        """`grace`: in seconds."""
        self.grace = grace
        self._clock = clock
        self._deadline: float | None = None
        self.asked: list[Asked] = []
        """What was asked of this rank so far."""

    def listen(self) -> Interrupt:
        """Have SIGUSR2 and SIGTERM ask from now on. In the main thread."""
        signal.signal(signal.SIGUSR2, lambda *_: self.ask(self.grace, "SIGUSR2"))
        term_grace = min(self.grace, TERM_GRACE)
        signal.signal(signal.SIGTERM, lambda *_: self.ask(term_grace, "SIGTERM"))
        return self

    def ask(self, grace: float, by: str = "") -> None:
        """End the run in `grace` seconds at the latest; `by`: the signal that asks."""
        self.asked.append(Asked(by, grace))
        deadline = self._clock() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    @property
    def drain(self) -> bool:
        """Whether the run should end soon: nothing new is to be begun."""
        return self._deadline is not None

    @property
    def halt(self) -> bool:
        """Whether it should end now."""
        return self._deadline is not None and self._clock() >= self._deadline

    @property
    def wish(self) -> bytes:
        """DRAIN, HALT or nothing."""
        return HALT if self.halt else DRAIN if self.drain else b""
