"""What an instance computes and moves in a step, and which queries that sends to creditors."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.ids import InstanceId, TableKey
from hpc_distkv.memory.books.swap import SwapMove
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager

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
    to_host: SequenceOf[SwapMove] = ()
    """rBlocks that go to the host's memory."""
    from_host: SequenceOf[SwapMove] = ()
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

Asked = tuple[list[TableKey], int, int]
"""Guests, query rows and the position of the first: as a header says it."""


class Query(NamedTuple):
    """One sequence's queries to one creditor."""

    guests: list[TableKey]
    """The sequence's request, its prefixes, or both."""
    rows: int
    position: int
    """Of the first query in the sequence."""
    first: int
    """Of the first query among the tokens of the step."""

    @property
    def asked(self) -> Asked:
        """As a header says it."""
        return self.guests, self.rows, self.position


def remote_queries(
    rm: RManager, scheduled: Iterable[Scheduled[Sequence]]
) -> dict[InstanceId, list[Query]]:
    """Creditor → the queries it gets in a step, those of the same guests together."""
    queries: dict[InstanceId, list[Query]] = {}
    if not rm.borrower.debts:
        return queries
    first = 0
    for sequence, count in scheduled:
        guests: dict[InstanceId, list[TableKey]] = {}
        for key, table in rm.parts(sequence.id).items():
            for creditor in table.remote:
                guests.setdefault(creditor, []).append(key)
        for creditor, keys in guests.items():
            queries.setdefault(creditor, []).append(Query(keys, count, sequence.computed, first))
        first += count
    for asked in queries.values():
        asked.sort(key=attrgetter("guests"))
    return queries


def host_queries(rm: RManager, scheduled: Iterable[Scheduled[Sequence]]) -> list[Query]:
    """The queries of a step to what is in the host's memory, those of the same guests together."""
    queries: list[Query] = []
    if not rm.swap.used:
        return queries
    first = 0
    for sequence, count in scheduled:
        if keys := [key for key, table in rm.parts(sequence.id).items() if table.in_host]:
            queries.append(Query(keys, count, sequence.computed, first))
        first += count
    return sorted(queries, key=attrgetter("guests"))
