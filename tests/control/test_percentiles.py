"""Percentiles against what "nearest rank" says, word for word."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from hpc_distkv.control.messages.percentiles import percentiles


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
