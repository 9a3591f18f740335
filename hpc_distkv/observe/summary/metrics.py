"""The figures of a finished run."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from hpc_distkv.control.messages.counters import Counters
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
