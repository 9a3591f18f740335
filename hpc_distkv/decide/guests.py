"""Which queries of a step go to which guests."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from hpc_distkv.decide.plan import Scheduled
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.ids import InstanceId, TableKey
from hpc_distkv.memory.rmanager import RManager

Asked = tuple[list[TableKey], int, int]
"""Guests, query rows and the position of the first: as a header says it."""


class Query(NamedTuple):
    """One row's queries to one creditor."""

    guests: list[TableKey]
    """The row's request, its prefixes, or both."""
    rows: int
    position: int
    """Of the first query in the row's sequence."""
    first: int
    """Of the first query among the tokens of the step."""

    @property
    def asked(self) -> Asked:
        """As a header says it."""
        return self.guests, self.rows, self.position


def remote_queries(
    rm: RManager, rows: Iterable[Scheduled[Sequence]]
) -> dict[InstanceId, list[Query]]:
    """Creditor → the queries it gets in a step, those of the same guests together."""
    queries: dict[InstanceId, list[Query]] = {}
    if not rm.borrower.debts:
        return queries
    first = 0
    for sequence, count in rows:
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


def host_queries(rm: RManager, rows: Iterable[Scheduled[Sequence]]) -> list[Query]:
    """The queries of a step to what is in the host's memory, those of the same guests together."""
    queries: list[Query] = []
    if not rm.swap.used:
        return queries
    first = 0
    for sequence, count in rows:
        if keys := [key for key, table in rm.parts(sequence.id).items() if table.in_host]:
            queries.append(Query(keys, count, sequence.computed, first))
        first += count
    return sorted(queries, key=attrgetter("guests"))
