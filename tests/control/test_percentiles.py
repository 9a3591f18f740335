"""Percentiles against what "nearest rank" says, word for word, and gaps counted in bins against a
sort of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpc_distkv.control.messages.percentiles import (
    BINS_PER_OCTAVE,
    gap_bin,
    gap_summary,
    percentiles,
)


def nearest_rank(values: Sequence[float], percent: int) -> float:
    """The smallest value with at least `percent` % of all values at or below it."""
    return min(
        value
        for value in values
        if 100 * sum(other <= value for other in values) >= percent * len(values)
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=120))
@example([1, 2])
@example([1, 2, 3, 4])
@example([*range(200)])
def test_percentiles_are_nearest_ranks(values):
    expected = {f"p{p}": nearest_rank(values, p) for p in (50, 90, 99)} | {"max": max(values)}
    assert percentiles(sorted(values)) == expected


# -- gaps -----------------------------------------------------------------------------------------

HALF_A_BIN = 2 ** (0.5 / BINS_PER_OCTAVE) - 1
seconds = st.floats(1e-3, 1e4, allow_nan=False)


def counted(times: list[float]) -> Counter[int]:
    return Counter(map(gap_bin, times))


@given(seconds)
def test_a_bin_is_four_percent_wide_and_holds_its_times(time):
    lowest = 2 ** (gap_bin(time) / BINS_PER_OCTAVE)
    assert lowest * (1 - 1e-12) <= time <= lowest * 1.045


@given(st.lists(seconds, min_size=1, max_size=300))
def test_percentiles_are_those_of_a_sort_within_half_a_bin(times):
    expected = {f"p{p}": nearest_rank(times, p) for p in (50, 90, 99)} | {"max": max(times)}
    summary = gap_summary(counted(times))
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=HALF_A_BIN * 1.001, abs=1e-5)


@given(st.lists(seconds, max_size=50), st.lists(seconds, max_size=50))
def test_counts_of_several_instances_add_up(some, others):
    assert gap_summary(counted(some) + counted(others)) == gap_summary(counted(some + others))


def test_a_gap_of_nothing_has_a_bin():
    assert gap_bin(0.0) == gap_bin(1e-7) == gap_bin(1e-6)


def test_without_gaps_there_is_no_summary():
    assert gap_summary({}) == {}
