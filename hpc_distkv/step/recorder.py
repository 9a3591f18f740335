"""Spans of a rank's time, for traces."""

from __future__ import annotations

from enum import IntEnum


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
    """Rank 0: the gManager's part of a round, with reading rows and writing answers."""
    HOST = 8
    """MicroAttention of own queries over rBlocks in the host's memory."""

    LAYER = 9
    """One layer of a step, from its attention to that of the next."""
    EXCHANGE = 10
    """Queries and partial results under way."""
    UNDER_WAY = 11
    """rBlocks under way."""
    DEBTOR_STEP = 12
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
