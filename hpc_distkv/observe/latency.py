"""Percentiles of what rows waited."""

from __future__ import annotations

from array import array

PERCENTILES = (50, 90, 99)


class Latencies:
    """Seconds, one value per answered row."""

    def __init__(self) -> None:
        self._seconds = array("f")

    def add(self, seconds: float) -> None:
        """One more row."""
        self._seconds.append(seconds)

    def summary(self) -> dict[str, float]:
        """Mean and percentiles (nearest rank) in seconds; empty without rows."""
        if not self._seconds:
            return {}
        ordered = sorted(self._seconds)
        last = len(ordered) - 1
        shown = {f"p{p}": ordered[round(last * p / 100)] for p in PERCENTILES}
        summary = {"mean": sum(ordered) / len(ordered), **shown, "max": ordered[-1]}
        return {name: round(seconds, 4) for name, seconds in summary.items()}
