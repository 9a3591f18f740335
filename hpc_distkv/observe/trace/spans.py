"""When a rank did what, in bounded memory."""

from __future__ import annotations

import struct
import time
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_distkv.comm.collective.clock import ClockOffset, measure_clock
from hpc_distkv.comm.transport import Comm
from hpc_distkv.step.timesheet import Kind, Recorder

MOST_SPANS = 500_000
"""Of all ranks together: about 60 MB of JSON."""
MOST_OF_RANK, LEAST_OF_RANK = 65_536, 4_096
WINDOWS = 8
"""Windows per second: spans are kept or left out by the window in which they begin."""
FINE = frozenset({Kind.PARTIALS, Kind.SERVE, Kind.HOST, Kind.LAYER, Kind.EXCHANGE})
"""One or more in every layer: kept in one of FINE_EVERY windows only."""
FINE_EVERY = 8

RECORD = struct.Struct("<Bddii")
DTYPE = np.dtype(
    [("kind", "u1"), ("started", "<f8"), ("ended", "<f8"), ("one", "<i4"), ("other", "<i4")]
)

Spans = NDArray[Any]
"""[spans] of DTYPE."""


class Trace(Recorder):
    """Owner of one rank's spans.

    Memory is bounded: where there are too many, every second window of time that is kept is
    dropped and left out from then on. All ranks cut time into the same windows, so what remains of
    a long run is short stretches, evenly over the whole of it, in which all ranks are seen at work
    together.
    """

    def __init__(self, most: int, origin: float, clock: ClockOffset) -> None:
        """`most`: spans kept; `origin`: where windows are counted from, the same moment on all
        ranks, by this rank's clock; `clock`: how that relates to rank 0's."""
        self.most, self.origin, self.clock = most, origin, clock
        self.stride = 1
        """One of so many windows is kept."""
        self._buffer = bytearray(most * RECORD.size)
        self._end = 0
        self._masks = _masks(1)
        self._open: dict[tuple[Kind, int], float] = {}
        self._layer, self._layer_began = -1, 0.0

    def span(self, kind: Kind, started: float, ended: float, one: int = 0, other: int = 0) -> None:
        """Keep the span, if it began in a window that is kept."""
        window = int((started - self.origin) * WINDOWS)
        if self._end == len(self._buffer) and self.stride <= window:
            self._thin(window)
        if window & self._masks[kind] or self._end == len(self._buffer):
            return
        RECORD.pack_into(self._buffer, self._end, kind, started, ended, one, other)
        self._end += RECORD.size

    def open(self, kind: Kind, key: int = 0) -> None:
        """A span that overlaps with others begins."""
        self._open[kind, key] = time.perf_counter()

    def close(self, kind: Kind, key: int = 0, one: int = 0, other: int = 0) -> None:
        """It ends."""
        self.span(kind, self._open.pop((kind, key)), time.perf_counter(), one, other)

    def layer(self, layer: int) -> None:
        """A layer begins, and the last one ends."""
        now = time.perf_counter()
        if self._layer >= 0:
            self.span(Kind.LAYER, self._layer_began, now, self._layer)
        self._layer, self._layer_began = layer, now

    @property
    def spans(self) -> Spans:
        """All that is kept."""
        return np.frombuffer(bytes(self._buffer[: self._end]), DTYPE)

    def _thin(self, window: int) -> None:
        """Keep half as many windows as before, or fewer, until there is room; it is `window`."""
        while self._end == len(self._buffer) and self.stride <= window:
            self.stride *= 2
            self._masks = _masks(self.stride)
            spans = self.spans
            windows = ((spans["started"] - self.origin) * WINDOWS).astype(np.int64)
            kept = spans[(windows & np.array(self._masks)[spans["kind"]]) == 0].tobytes()
            self._buffer[: len(kept)] = kept
            self._end = len(kept)


def _masks(stride: int) -> list[int]:
    """By kind: which bits of a window's number are 0 if it is kept."""
    return [stride * (FINE_EVERY if kind in FINE else 1) - 1 for kind in Kind]


class RankSpans(NamedTuple):
    """What one rank kept, as rank 0 sees it."""

    spans: Spans
    """Times in seconds since the origin of the trace, by rank 0's clock."""
    stride: int
    clock_error: float
    """Seconds at most, either way."""


class _Packed(msgspec.Struct, array_like=True):
    """A rank's part on its way to rank 0."""

    spans: bytes
    stride: int
    origin: float
    clocks: tuple[ClockOffset, ClockOffset]
    """At the start and at the end."""


def begin_trace(comm: Comm) -> Trace:
    """Align the clocks of all ranks, and begin this rank's trace. Collective; no round may be
    open. Raises StallError."""
    clock = measure_clock(comm)
    origin = comm.share(time.perf_counter())[0]
    most = max(LEAST_OF_RANK, min(MOST_OF_RANK, MOST_SPANS // comm.world.size))
    return Trace(most, origin + clock.seconds, clock)


def gather_traces(comm: Comm, trace: Trace) -> list[RankSpans]:
    """The traces of all ranks, by rank, on rank 0; [] elsewhere. Collective; no round may be open.

    Clocks of different nodes drift apart by some milliseconds in an hour, so they are compared
    once more, and what they showed in between follows a straight line.
    """
    clocks = (trace.clock, measure_clock(comm))
    packed = _Packed(trace.spans.tobytes(), trace.stride, trace.origin, clocks)
    messages = comm.gather(msgspec.msgpack.encode(packed))
    ranks = [msgspec.msgpack.decode(message, type=_Packed) for message in messages]
    return [_unpacked(rank, trace.origin) for rank in ranks]


def _unpacked(packed: _Packed, origin: float) -> RankSpans:
    first, last = packed.clocks
    spans = np.frombuffer(packed.spans, DTYPE).copy()
    drift = (last.seconds - first.seconds) / max(last.at - first.at, 1e-9)
    for edge in ("started", "ended"):
        times = spans[edge]
        spans[edge] = times - (first.seconds + drift * (times - first.at)) - origin
    return RankSpans(spans, packed.stride, max(first.error, last.error))
