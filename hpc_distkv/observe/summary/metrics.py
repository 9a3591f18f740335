"""The figures of a finished run, percentiles of what answers took among them."""

from __future__ import annotations

import json
import resource
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.percentiles import BINS_PER_OCTAVE, gap_bin, ranks
from hpc_distkv.regular import replace_file

PEAKS = ("peak_borrowed", "peak_host")
"""Counters of which the largest counts, not the sum."""


class RankFigures(msgspec.Struct, array_like=True):
    """What one rank has to say of a run when it is over."""

    counters: Counters
    """Of its instance, but for times and bytes, which are the rank's own."""
    peak_memory: int
    """Bytes."""
    threads: int


def total(counters: Sequence[Counters]) -> dict[str, Any]:
    """The counters of all instances added up; peaks are the largest of any, and
    `prediction_error` the mean of those that have one."""
    rows = [msgspec.structs.asdict(each) for each in counters]
    numbers = [name for name in Counters.__struct_fields__ if name != "gaps"]
    summed: dict[str, Any] = {name: sum(row[name] for row in rows) for name in numbers}
    for peak in PEAKS:
        summed[peak] = max((row[peak] for row in rows), default=0)
    summed["prediction_error"] = mean_error(row["prediction_error"] for row in rows)
    gaps: Counter[int] = Counter()
    for row in rows:
        gaps.update(row["gaps"])
    return summed | {"gaps": dict(gaps)}


def mean_error(errors: Iterable[float]) -> float:
    """The mean `prediction_error` of those that have one: who predicted nothing has 0."""
    known = [error for error in errors if error]
    return fmean(known) if known else 0.0


def peak_memory() -> int:
    """Most bytes of memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Replace `path` by `figures`, all of them or nothing. Raises OSError."""
    replace_file(path, [json.dumps(figures, indent=2).encode(), b"\n"])


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
