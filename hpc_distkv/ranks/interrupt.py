"""A run that has to end before all rows are answered."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

GRACE = 15.0
"""Seconds that what runs has to finish, unless told otherwise."""
TERM_GRACE = 10.0
"""Seconds at most after SIGTERM: Slurm kills 30 s after it (KillWait), and the results have to be
on the disk by then."""
DRAIN, HALT = b"drain", b"halt"
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""That ask a run to end."""


def ignore_signals() -> None:
    """From now on there is no run to be ended, and how the process leaves is settled."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Asked(NamedTuple):
    """That a rank was asked to stop."""

    by: str
    """Whoever asks: the name of a signal."""
    grace: float
    """Seconds it was given."""


class Interrupt:
    """When one rank was asked to stop, and until when it may go on with what it has begun.

    A signal only sets the deadline; what the rank wants goes into its next report, so that all
    ranks stop in the same control round. Further signals may bring the deadline forward.
    """

    def __init__(
        self,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
        also: Interrupt | None = None,
    ) -> None:
        """`grace`: in seconds; `also`: another one, which counts as well."""
        self.grace = grace
        self._also = also
        self._clock = clock
        self._deadline: float | None = None
        self._asked: list[Asked] = []

    def listen(self, arrived: Iterable[int] = ()) -> Interrupt:
        """Have SIGUSR2 and SIGTERM ask from now on; `arrived`: those that came before. In the main
        thread."""
        for number in SIGNALS:
            signal.signal(number, self._hear)
        for early in arrived:
            self._hear(early)
        return self

    def _hear(self, number: int, _frame: object = None) -> None:
        grace = min(self.grace, TERM_GRACE) if number == signal.SIGTERM else self.grace
        self.ask(grace, signal.Signals(number).name)

    def ask(self, grace: float, by: str = "") -> None:
        """End the run in `grace` seconds at the latest; `by`: who asks, as a signal's name."""
        self._asked.append(Asked(by, grace))
        deadline = self._clock() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    @property
    def asked(self) -> list[Asked]:
        """What was asked of this rank so far."""
        return [*(self._also.asked if self._also else ()), *self._asked]

    @property
    def drain(self) -> bool:
        """Whether the run should end soon: nothing new is to be begun."""
        return self._deadline is not None or (self._also is not None and self._also.drain)

    @property
    def halt(self) -> bool:
        """Whether it should end now."""
        over = self._deadline is not None and self._clock() >= self._deadline
        return over or (self._also is not None and self._also.halt)

    @property
    def wish(self) -> bytes:
        """DRAIN, HALT or nothing."""
        return HALT if self.halt else DRAIN if self.drain else b""
