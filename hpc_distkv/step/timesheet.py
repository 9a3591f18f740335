"""How the time of a rank is divided."""

from __future__ import annotations

import time

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.step.recorder import Kind, Recorder

FIELDS = {
    Kind.OTHER: "other_time",
    Kind.STEP: "compute_time",
    Kind.PARTIALS: "partial_wait",
    Kind.MOVES: "move_wait",
    Kind.SERVE: "serve_time",
    Kind.QUERIES: "query_wait",
    Kind.CONTROL: "control_wait",
    Kind.LEAD: "lead_time",
    Kind.HOST: "host_time",
}
"""Kinds that exclude each other → the field of `Counters` that has their seconds. Together they are
all the time since the start."""


class TimeSheet:
    """Owner of how a rank's time is divided: every moment counts for the one kind that was entered
    last and not left, so what is done inside a wait is not waiting.

    Costs two readings of the clock for each thing that is entered and left.
    """

    def __init__(self, recorder: Recorder) -> None:
        """Begin, with `Kind.OTHER`."""
        self.recorder = recorder
        self._spent = [0.0] * len(FIELDS)
        self._kind = Kind.OTHER
        self._began = self._since = time.perf_counter()
        """When the current kind was entered, and from when on it is not counted yet."""
        self._outer: list[tuple[Kind, float]] = []

    def enter(self, kind: Kind) -> None:
        """Time counts for `kind` from now on."""
        now = self._count()
        self._outer.append((self._kind, self._began))
        self._kind, self._began = kind, now

    def leave(self, one: int = 0, other: int = 0, record: bool = True) -> None:
        """Time counts for the kind before again. `one` and `other`: as in `Recorder`."""
        now = self._count()
        if record:
            self.recorder.span(self._kind, self._began, now, one, other)
        self._kind, self._began = self._outer.pop()

    def turn(self, kind: Kind) -> None:
        """Leave the current kind, unless it is `kind`, and enter `kind`."""
        if kind is not self._kind:
            self.leave()
            self.enter(kind)

    def spent(self, *kinds: Kind) -> float:
        """Seconds of `kinds` so far, without the current span."""
        return sum(self._spent[kind] for kind in kinds)

    def fill(self, counters: Counters) -> None:
        """Write all times into `counters`."""
        self._count()
        for kind, field in FIELDS.items():
            setattr(counters, field, self._spent[kind])

    def _count(self) -> float:
        now = time.perf_counter()
        self._spent[self._kind] += now - self._since
        self._since = now
        return now
