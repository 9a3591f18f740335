"""Times between two tokens of a row, counted in bins: a few numbers, however many tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

BINS_PER_OCTAVE = 16
"""Width of a bin: 4 %."""
PERCENTILES = (50, 90, 99)


def gap_bin(seconds: float) -> int:
    """The bin of a time between two tokens of a row."""
    return math.floor(math.log2(max(seconds, 1e-6)) * BINS_PER_OCTAVE)


def gap_summary(gaps: Mapping[int, int]) -> dict[str, float]:
    """Percentiles (nearest rank) in seconds of times counted by bin, to the middle of the bin;
    empty without any."""
    total = sum(gaps.values())
    if not total:
        return {}
    summary, seen = {}, 0
    ranks = {f"p{p}": round((total - 1) * p / 100) for p in PERCENTILES} | {"max": total - 1}
    for at, count in sorted(gaps.items()):
        seen += count
        for name, rank in ranks.items():
            if rank < seen and name not in summary:
                summary[name] = round(2 ** ((at + 0.5) / BINS_PER_OCTAVE), 5)
    return summary
