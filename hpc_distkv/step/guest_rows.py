"""The batch that a creditor's kernel works on: the queries of others, over rBlocks it hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter

from hpc_distkv.attention import PagedRow
from hpc_distkv.decide.plan import Asked
from hpc_distkv.ids import TableKey

Hosted = Callable[[list[TableKey]], tuple[list[int], list[int]]]
"""Guests → their slots, and the logical index of each."""


def guest_rows(
    asked: Iterable[Asked], hosted: Hosted, block_size: int, together: bool
) -> list[PagedRow]:
    """A row for each query, or, `together`, for all queries of the same guests, where positions do
    not matter: then they are served at once."""
    rows: list[PagedRow] = []
    for guests, queries in groupby(asked, key=itemgetter(0)):
        counts = [(count, position) for _, count, position in queries]
        if together:
            counts = [(sum(count for count, _ in counts), 0)]
        slots, indices = hosted(guests)
        first_token, kv_len = [index * block_size for index in indices], len(slots) * block_size
        rows += [PagedRow(n, position, slots, first_token, kv_len) for n, position in counts]
    return rows
