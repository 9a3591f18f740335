"""Percentiles by nearest rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

PERCENTILES = (50, 90, 99)


def ranks(count: int) -> dict[str, int]:
    """Percentile, or "max" → its place among `count` values in ascending order: that of the
    smallest one with at least that part of all values at or below it. `count` is at least 1."""
    return {f"p{p}": -(-count * p // 100) - 1 for p in PERCENTILES} | {"max": count - 1}


def percentiles(ordered: Sequence[T]) -> dict[str, T]:
    """The percentiles and the maximum of values in ascending order, of which there is at least
    one."""
    return {name: ordered[rank] for name, rank in ranks(len(ordered)).items()}
