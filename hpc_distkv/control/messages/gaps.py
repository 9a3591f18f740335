"""Times between two tokens of a row, counted in bins: a few numbers, however many tokens."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

from hpc_distkv.control.messages.percentiles import ranks

BINS_PER_OCTAVE = 16
"""Width of a bin: 4 %."""


def gap_bin(seconds: float) -> int:
    """The bin of a time between two tokens of a row."""
    return math.floor(math.log2(max(seconds, 1e-6)) * BINS_PER_OCTAVE)


def gap_summary(gaps: Mapping[int, int]) -> dict[str, float]:
    """Percentiles in seconds of times counted by bin, to the middle of the bin; empty without
    any."""
    bins = sorted(gaps)
    ends = list(accumulate(gaps[at] for at in bins))
    if not ends:
        return {}
    places = {name: bins[bisect_right(ends, rank)] for name, rank in ranks(ends[-1]).items()}
    return {name: round(2 ** ((at + 0.5) / BINS_PER_OCTAVE), 5) for name, at in places.items()}
