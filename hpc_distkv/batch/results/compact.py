"""Millions of numbers, and whether one is among them."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np


class CompactSet:
    """Integers in as many bytes as the array's type `code` takes ("q": 8, "I": 4). They are sorted
    at the first question after one was added, so add all before asking."""

    def __init__(self, code: str) -> None:
        self._values = array(code)
        self._sorted = True

    def add(self, value: int) -> None:
        """Raises OverflowError for one that the type cannot hold."""
        self._values.append(value)
        self._sorted = False

    def include(self, other: CompactSet) -> None:
        """Add what another one of the same type holds."""
        self._values.extend(other._values)
        self._sorted = False

    def __contains__(self, value: int) -> bool:
        if not self._sorted:
            np.frombuffer(self._values, self._values.typecode).sort()
            self._sorted = True
        place = bisect_left(self._values, value)
        return place < len(self._values) and self._values[place] == value
