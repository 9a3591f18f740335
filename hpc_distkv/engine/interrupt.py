"""A run that has to end before all rows are answered."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

GRACE = 15.0
"""Seconds that what runs has to finish, unless told otherwise."""
TERM_GRACE = 10.0
"""Seconds at most after SIGTERM: Slurm kills 30 s after it (KillWait), and the results have to be
on the disk by then."""
DRAIN, HALT = b"drain", b"halt"


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

    def listen(self) -> Interrupt:
        """Have SIGUSR2 and SIGTERM ask from now on. In the main thread."""
        signal.signal(signal.SIGUSR2, lambda *_: self.ask(self.grace))
        signal.signal(signal.SIGTERM, lambda *_: self.ask(min(self.grace, TERM_GRACE)))
        return self

    def ask(self, grace: float) -> None:
        """End the run in `grace` seconds at the latest."""
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
