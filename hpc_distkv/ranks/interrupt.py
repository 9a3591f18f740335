"""Ends a run before all rows are answered: on a signal, with a grace period."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

GRACE = 15.0
"""Seconds that running requests have to finish, by default."""
TERM_GRACE = 10.0
"""Seconds at most after SIGTERM: Slurm kills 30 s after it (KillWait), and the results have to be
on the disk by then."""
DRAIN, HALT = b"drain", b"halt"
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Signals that ask a run to end."""


def ignore_signals() -> None:
    """Ignore SIGUSR2 and SIGTERM: the run is over, and the exit status is settled."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Asked(NamedTuple):
    """One request to stop."""

    by: str
    """The name of the signal."""
    grace: float
    """Seconds that the run was given."""


class Interrupt:
    """Whether one rank was asked to stop, and its deadline for what runs.

    A signal only sets the deadline; the rank's wish goes into its next report, so that all ranks
    stop in the same control round. Further signals may bring the deadline forward.
    """

    def __init__(
        self,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
        also: Interrupt | None = None,
    ) -> None:
        """`grace`: in seconds; `also`: another interrupt that counts as well."""
        self.grace = grace
        self._also = also
        self._clock = clock
        self._deadline: float | None = None
        self._asked: list[Asked] = []

    def listen(self, arrived: Iterable[int] = ()) -> Interrupt:
        """Handle SIGUSR2 and SIGTERM from now on; `arrived`: those that came before. Call it in the
        main thread."""
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
        """All requests to stop so far."""
        return [*(self._also.asked if self._also else ()), *self._asked]

    @property
    def drain(self) -> bool:
        """True if the run should end soon: no further row is begun."""
        return self._deadline is not None or (self._also is not None and self._also.drain)

    @property
    def halt(self) -> bool:
        """True if the run should end now."""
        over = self._deadline is not None and self._clock() >= self._deadline
        return over or (self._also is not None and self._also.halt)

    @property
    def wish(self) -> bytes:
        """DRAIN, HALT or nothing."""
        return HALT if self.halt else DRAIN if self.drain else b""
