"""Which rows an input has, and by what the results know them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hpc_distkv.batch.answered import DUPLICATE, Answered
from hpc_distkv.batch.intake import Intake
from hpc_distkv.batch.shard import Shard


class Place(NamedTuple):
    """A row of the input."""

    number: int
    """Its line, from 0."""
    custom_id: str | None
    repeated: bool
    """Whether an earlier row has its custom_id."""

    @property
    def name(self) -> str | None:
        """The custom_id by which its line of the results is known; None: by its number."""
        return None if self.repeated else self.custom_id

    def shard(self, count: int) -> int:
        """Index of the shard, of `count`, that answers it."""
        return Shard.dealt(self.custom_id, self.number, count)

    def done(self, answered: Answered) -> bool:
        """Whether it has a line."""
        if self.name is None:
            return self.number in answered.numbers
        return self.name in answered.custom_ids


def places(source: Path) -> Iterator[Place]:
    """The rows of an input, in order. Takes a hundred bytes of memory a row. Raises InputError."""
    intake = Intake(source)
    try:
        for envelope in intake.envelopes(Answered()):
            assert envelope is not None
            problem = envelope.problem
            repeated = problem is not None and problem.code == DUPLICATE
            yield Place(envelope.number, envelope.custom_id, repeated)
    finally:
        intake.close()
