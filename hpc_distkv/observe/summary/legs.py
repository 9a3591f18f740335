"""The figures of several runs as one: of the legs of a job, or of the shards of an array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hpc_distkv.control.messages.percentiles import gap_bin, gap_summary
from hpc_distkv.observe.summary.metrics import PEAKS, histogram, mean_error
from hpc_distkv.observe.summary.run import SLOWEST

Figures = dict[str, Any]
DISTRIBUTIONS = ("time_to_first_token_s", "between_tokens_s", "latency_s")
SUMS = ("seconds", "prompt_tokens", "output_tokens")


def merged(legs: Sequence[Figures]) -> Figures:
    """The metrics of runs in the order of time, put together.

    Everything is summed up but for rows, which are those of each job's last run, since that counts
    what the others have done; peaks, which are the largest; and percentiles, which are those of the
    histograms, to 4 %. Rates are tokens over the seconds of all runs: those of a run in the mean,
    also where runs of an array went on at the same time.
    """
    if len(legs) == 1:
        return legs[0]
    figures: Figures = {name: sum(leg[name] for leg in legs) for name in SUMS}
    counters = _counters([leg["counters"] for leg in legs])
    seconds = max(figures["seconds"], 1e-9)
    generated = counters["generated_tokens"]
    slowest = [row for leg in legs for row in leg["slowest_rows"]]
    return figures | {
        "request_counts": _rows(legs),
        "output_tokens_per_second": generated / seconds,
        "tokens_per_second": (generated + counters["prompt_tokens"]) / seconds,
        **{name: _summary(legs, name) for name in DISTRIBUTIONS},
        "histograms": {name: histogram(_bins(legs, name)) for name in DISTRIBUTIONS},
        "counters": counters,
        "ranks": _ranks(legs),
        "slowest_rows": sorted(slowest, key=lambda row: -row["latency_s"])[:SLOWEST],
    }


def _rows(legs: Sequence[Figures]) -> dict[str, int | None]:
    last = {leg.get("job", {}).get("output"): leg["request_counts"] for leg in legs}
    counts = list(last.values())
    totals = [each["total"] for each in counts]
    return {
        "total": None if None in totals else sum(totals),
        "completed": sum(each["completed"] for each in counts),
        "failed": sum(each["failed"] for each in counts),
    }


def _counters(each: Sequence[Figures]) -> Figures:
    names = {name: None for counters in each for name in counters}
    summed: Figures = {name: sum(counters.get(name, 0) for counters in each) for name in names}
    for peak in PEAKS:
        summed[peak] = max(counters.get(peak, 0) for counters in each)
    summed["prediction_error"] = mean_error(c.get("prediction_error", 0.0) for c in each)
    return summed


def _ranks(legs: Sequence[Figures]) -> list[Figures]:
    """By number, whatever ran there in each of the runs."""
    by_number: dict[int, list[Figures]] = {}
    for leg in legs:
        for rank in leg["ranks"]:
            by_number.setdefault(rank["rank"], []).append(rank["counters"])
    return [
        {"rank": number, "counters": _counters(counters)}
        for number, counters in sorted(by_number.items())
    ]


def _bins(legs: Sequence[Figures], name: str) -> dict[int, int]:
    bins = Counter[int]()
    for leg in legs:
        for seconds, count in leg["histograms"][name]:
            bins[gap_bin(seconds)] += count
    return bins


def _summary(legs: Sequence[Figures], name: str) -> dict[str, float]:
    summary, bins = {}, _bins(legs, name)
    known = [leg for leg in legs if leg[name]]
    if known and all("mean" in leg[name] for leg in known):
        weights = [sum(count for _, count in leg["histograms"][name]) for leg in known]
        summary["mean"] = fmean([leg[name]["mean"] for leg in known], weights)
    summary |= gap_summary(bins)
    if known:
        summary["max"] = max(leg[name]["max"] for leg in known)
    return summary
