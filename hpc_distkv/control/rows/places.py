"""Where there is room for rows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """An instance with room."""

    load: float
    """Predicted work of its rows."""
    instance: int
    rows: int
    """That may still be assigned."""
    tokens: int
    """Prompt tokens after which no further row should be."""


class Places:
    """The instances that take rows, until their room is used up."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._open = {place.instance: place for place in places}
        self._heap = list(self._open.values())
        """Also has what a place was before it took rows."""
        heapq.heapify(self._heap)

    def __bool__(self) -> bool:
        return bool(self._open)

    def least(self, instances: Iterable[int]) -> Place | None:
        """The one with least load out of `instances`, if any of them has room."""
        return min((self._open[i] for i in instances if i in self._open), default=None)

    def least_of_all(self) -> Place:
        """The one with least load."""
        while self._open.get(self._heap[0].instance) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def take(self, place: Place, work: float, tokens: int) -> None:
        """One more row goes to `place`: so much work, with so many tokens of its prompt to
        compute."""
        load, instance, rows, room = place
        del self._open[instance]
        if rows > 1 and room > tokens:
            taken = Place(load + work, instance, rows - 1, room - tokens)
            self._open[instance] = taken
            heapq.heappush(self._heap, taken)
