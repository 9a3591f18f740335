"""Percentiles by nearest rank, of values and of token gaps.

A gap is the time between two tokens of one request. Gaps are counted in bins, so that a few numbers
stand for any number of tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")

PERCENTILES = (50, 90, 99)
BINS_PER_OCTAVE = 16
"""Width of a bin: 4 %."""


def ranks(count: int) -> dict[str, int]:
    """Percentile, or "max" → its place among `count` values in ascending order: that of the
    smallest one with at least that part of all values at or below it. `count` is at least 1."""
    return {f"p{p}": -(-count * p // 100) - 1 for p in PERCENTILES} | {"max": count - 1}


def percentiles(ordered: Sequence[T]) -> dict[str, T]:
    """The percentiles and the maximum of values in ascending order, of which there is at least
    one."""
    return {name: ordered[rank] for name, rank in ranks(len(ordered)).items()}


def gap_bin(seconds: float) -> int:
    """The bin of a gap."""
    return math.floor(math.log2(max(seconds, 1e-6)) * BINS_PER_OCTAVE)


def gap_summary(gaps: Mapping[int, int]) -> dict[str, float]:
    """The percentiles of gaps in seconds, each the middle of its bin. `gaps`: bin → count. Empty
    without any."""
    bins = sorted(gaps)
    ends = list(accumulate(gaps[at] for at in bins))
    if not ends:
        return {}
    places = {name: bins[bisect_right(ends, rank)] for name, rank in ranks(ends[-1]).items()}
    return {name: round(2 ** ((at + 0.5) / BINS_PER_OCTAVE), 5) for name, at in places.items()}
