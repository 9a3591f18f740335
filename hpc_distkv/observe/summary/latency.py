"""Percentiles of what answers took."""

from __future__ import annotations

from array import array

import numpy as np

from hpc_distkv.control.messages.percentiles import BINS_PER_OCTAVE, gap_bin, ranks


class Latencies:
    """Seconds, one value per answer of a row: four bytes each."""

    def __init__(self) -> None:
        self._seconds = array("f")

    def add(self, seconds: float) -> None:
        """One more answer."""
        self._seconds.append(seconds)

    def summary(self) -> dict[str, float]:
        """Mean, percentiles and maximum in seconds; empty without answers."""
        if not self._seconds:
            return {}
        ordered = np.sort(np.frombuffer(self._seconds, "f4"))
        shown = {name: ordered[rank] for name, rank in ranks(len(ordered)).items()}
        summary = {"mean": ordered.mean(dtype="f8"), **shown}
        return {name: round(float(seconds), 4) for name, seconds in summary.items()}

    def bins(self) -> dict[int, int]:
        """`control.messages.percentiles.gap_bin` → answers."""
        bins: dict[int, int] = {}
        for seconds in self._seconds:
            at = gap_bin(seconds)
            bins[at] = bins.get(at, 0) + 1
        return bins


def histogram(bins: dict[int, int]) -> list[tuple[float, int]]:
    """(seconds at the middle of the bin, count) in order, from times counted by `gap_bin`."""
    return [
        (float(f"{2 ** ((at + 0.5) / BINS_PER_OCTAVE):.4g}"), count)
        for at, count in sorted(bins.items())
    ]
