"""How the time of a rank is divided, and its spans for traces."""

from __future__ import annotations

import time
from enum import IntEnum

from hpc_distkv.control.messages.counters import Counters


class Kind(IntEnum):
    """What a span of a rank's time was. The first ones exclude each other (`TimeSheet`)."""

    OTHER = 0
    """Anything that is not below: bookkeeping, the end of the run."""
    STEP = 1
    """A step of its own; what follows is not counted with it."""
    PARTIALS = 2
    """Waiting for creditors' partial results."""
    MOVES = 3
    """Waiting for rBlocks."""
    SERVE = 4
    """MicroAttention of a debtor's queries over their guests."""
    QUERIES = 5
    """Without work of its own: waiting for the next queries of a debtor's step."""
    CONTROL = 6
    """Without work: waiting for the answer of a control round; of a follower, for its leader."""
    LEAD = 7
    """Rank 0: the gManager's part of a round."""
    HOST = 8
    """MicroAttention of own queries over rBlocks in the host's memory."""

    LAYER = 9
    """One layer of a step, from its attention to that of the next."""
    EXCHANGE = 10
    """Queries and partial results under way."""
    TRANSFER = 11
    """rBlocks under way."""
    VISIT = 12
    """A debtor's step, from its header until it is committed."""
    ROUND = 13
    """A control round, from the report to its answer."""


class Recorder:
    """Notes spans of time, in seconds of `time.perf_counter`. This one notes nothing;
    `observe.trace.spans` has one that does.

    `one` and `other` are two numbers that say more of a span (`observe.trace.spans.DETAILS`).
    """

    def span(self, kind: Kind, started: float, ended: float, one: int = 0, other: int = 0) -> None:
        """Note a span that is over."""

    def open(self, kind: Kind, key: int = 0) -> None:
        """Begin a span that may overlap with others; one at a time for each kind and key."""

    def close(self, kind: Kind, key: int = 0, one: int = 0, other: int = 0) -> None:
        """End the span of this kind and key."""

    def layer(self, layer: int) -> None:
        """End the last layer and begin `layer`; -1 begins none."""


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
