"""What an instance computes and moves in a step."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any, Generic, NamedTuple, TypeVar

from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.memory.books.swap import SwapMove
from hpc_distkv.memory.loan import Move

S = TypeVar("S", bound=Sequence, covariant=True)


class Scheduled(NamedTuple, Generic[S]):
    """The next `tokens` tokens of a sequence."""

    sequence: S
    tokens: int


class Plan(NamedTuple):
    """One step of one instance."""

    scheduled: list[Scheduled[Any]]
    """Ascending by request; sequences of the kind that the instance makes."""
    moves: list[Move]
    """rBlocks that leave."""
    recalls: list[Move]
    """rBlocks that come home."""
    leaving: list[Sequence]
    """Sequences that are handed over after this step."""
    to_host: Rows[SwapMove] = ()
    """rBlocks that go to the host's memory."""
    from_host: Rows[SwapMove] = ()
    """rBlocks that come home from there."""

    @property
    def idle(self) -> bool:
        """Whether nothing is computed, nor copied within the rank."""
        return not (self.scheduled or self.to_host or self.from_host)

    @property
    def moving(self) -> bool:
        """Whether rBlocks travel."""
        return bool(self.moves or self.recalls or self.to_host or self.from_host)


NOTHING = Plan([], [], [], [])
