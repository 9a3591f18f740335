"""The randomness of a request."""

from __future__ import annotations

import numpy as np

AHEAD = 64
"""Positions whose numbers are made at once: to set up a generator takes as long as hundreds."""


class Draws:
    """Uniform numbers in [0, 1), one for each position, from a counter-based generator
    (Philox4x64) keyed by the request's seed with the position as its counter: they depend on
    nothing else."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._first = 0
        self._numbers: list[float] = []

    def at(self, position: int) -> float:
        """The number of the token at `position`."""
        if not 0 <= position - self._first < len(self._numbers):
            philox = np.random.Philox(key=self._seed, counter=position)
            # A count of the generator gives four numbers, of which the first is taken.
            numbers = np.random.Generator(philox).random((AHEAD, 4))
            self._first, self._numbers = position, numbers[:, 0].tolist()
        return self._numbers[position - self._first]
