"""What the programs of a GPU launch do: tiles of queries, cut along their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.attention.paged import PagedBatch

Ints = NDArray[np.signedinteger[Any]]

ITEM_SIZE, MERGE_SIZE = 8, 4
_SPAN = 2**32
"""More than any position: (row, position) as one number."""


@dataclass(frozen=True)
class Tiles:
    """Queries of one row each, `lines` at most: what one program can take at once. Keys are counted
    by their index in the row's list of rBlocks."""

    query: Ints
    count: Ints
    position: Ints
    """Of the tile's first query."""
    table: Ints
    """Where in `PagedBatch.blocks` the row's list begins."""
    begin: Ints
    """Keys before this index are hidden from every query."""
    full: Ints
    """Keys from `begin` to here are seen by every query."""
    end: Ints
    """Keys from here on are hidden from every query."""
    exact: bool
    """Whether `begin` and `end` alone say what a tile's queries see."""

    @property
    def lengths(self) -> Ints:
        """Keys of each tile that are read."""
        return self.end - self.begin

    def cut(self, chunk: int, step: int, slot: int) -> tuple[Ints, Ints, int]:
        """Cut tiles of more than `chunk` keys into even parts, multiples of `step` long.

        Returns the items [n, ITEM_SIZE], those with most keys first: query, count, position, table,
        begin, full, end, and the partial result of the first query, or -1 where the tile is whole;
        the merges [m, MERGE_SIZE]: query, its first partial result, the distance to the next, their
        number; and the partial result after the last. The first is `slot`.
        """
        parts, size = parts_of(self.lengths, chunk, step)
        slots = np.where(parts > 1, parts * self.count, 0)
        first_slot = slot + np.cumsum(slots) - slots
        tile = np.repeat(np.arange(len(parts)), parts)
        nth = _within(parts)
        begin = self.begin[tile] + nth * size[tile]
        end = np.minimum(begin + size[tile], self.end[tile])
        full = np.clip(self.full[tile], begin, np.maximum(end, begin))
        partial = np.where(parts[tile] > 1, first_slot[tile] + nth * self.count[tile], -1)
        columns = (
            self.query[tile], self.count[tile], self.position[tile], self.table[tile],
            begin, full, end, partial,
        )  # fmt: skip
        items = np.stack(columns, 1)[np.argsort(begin - end, kind="stable")]
        split = np.flatnonzero(parts > 1)
        tile = np.repeat(split, self.count[split])
        nth = _within(self.count[split])
        merges = np.stack(
            (self.query[tile] + nth, first_slot[tile] + nth, self.count[tile], parts[tile]), 1
        )
        return items, merges, slot + int(slots.sum())


class KeyIndex:
    """From positions to the indices of keys, for all rows of a batch at once."""

    def __init__(self, batch: PagedBatch, block_size: int) -> None:
        self._block_size = block_size
        self.query_start = _wide(batch.query_start)
        self.query_position = _wide(batch.query_position)
        self.block_start = _wide(batch.block_start)
        self.kv_len = _wide(batch.kv_len)
        self._first = np.append(_wide(batch.first_token), 0)
        rows = np.arange(len(self.kv_len))
        self._keys = np.repeat(rows, np.diff(self.block_start)) * _SPAN + self._first[:-1]
        self.ordered = bool(np.all(np.diff(self._keys) > 0))
        """Whether the rBlocks of every row are listed by position."""

    @property
    def counts(self) -> Ints:
        """Queries of each row."""
        return np.diff(self.query_start)

    def tiles(self, rows: Ints, queries: int, *, causal: bool, window: int) -> Tiles:
        """Tiles of up to `queries` queries over these rows, as `micro_attention` masks them."""
        counts = -(-self.counts[rows] // queries)
        row, nth = np.repeat(rows, counts), _within(counts)
        query = self.query_start[row] + nth * queries
        count = np.minimum(self.query_start[row + 1] - query, queries)
        position = self.query_position[row] + nth * queries
        begin, end = np.zeros_like(row), self.kv_len[row]
        full = end
        if causal and self.ordered:
            end, full = self._seen(row, position + count - 1), self._seen(row, position)
        if window and self.ordered:
            hidden = self._seen(row, position - window)
            begin = np.minimum(hidden // self._block_size * self._block_size, end)
        masked = causal or window > 0
        if masked and (window or not self.ordered):
            full = begin
        exact = not masked or (self.ordered and not window and bool(np.all(count == 1)))
        return Tiles(query, count, position, self.block_start[row], begin, full, end, exact)

    def _seen(self, row: Ints, position: Ints) -> Ints:
        """How many keys of `row` are at `position` or before."""
        base = self.block_start[row]
        wanted = row * _SPAN + np.maximum(position, -1)
        count = np.searchsorted(self._keys, wanted, side="right") - base
        last = np.maximum(count - 1, 0)
        inside = np.minimum(position - self._first[base + last] + 1, self._block_size)
        seen = np.minimum(last * self._block_size + inside, self.kv_len[row])
        return np.where(count > 0, seen, 0)


def parts_of(lengths: Ints, chunk: int, step: int) -> tuple[Ints, Ints]:
    """Into how many parts of at most about `chunk` keys these lengths are cut, and the size of all
    parts but the last: even, and a multiple of `step`."""
    wanted = np.maximum(-(-lengths // chunk), 1)
    size = np.maximum(-(-lengths // (wanted * step)), 1) * step
    return np.maximum(-(-lengths // size), 1), size


def _within(counts: Ints) -> Ints:
    """0 … count - 1 for each count, one after another."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _wide(tensor: object) -> Ints:
    return np.asarray(tensor).astype(np.int64)
