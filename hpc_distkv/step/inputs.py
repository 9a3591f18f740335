"""What attention reads: a step's tokens, where their KV goes and what they attend to at home; and
the rBlocks that the queries of guests attend to."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from hpc_distkv.attention import PagedBatch, PagedRow
from hpc_distkv.decide.plan import Asked, Scheduled
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.ids import TableKey
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.memory.table import BlockTable, Slots

Hosted = Callable[[list[TableKey]], tuple[list[int], list[int]]]
"""Guests → their slots, and the logical index of each."""
Rows = Sequence[Scheduled[TokenSequence]]
"""What a step computes: the next tokens of each of its sequences."""
Ints = NDArray[np.signedinteger[Any]]


class Inputs(NamedTuple):
    """The numbers of T tokens, on the CPU."""

    tokens: torch.Tensor
    """int64 `[T]`."""
    positions: torch.Tensor
    """int64 `[T]`: places in their sequences."""
    ends: torch.Tensor
    """int64: which of the tokens end a row that has no token left to compute."""
    blocks: torch.Tensor
    """int32 `[T]`: the slots that their KV goes to. They are in the last rBlocks of a table, which
    are at home."""
    offsets: torch.Tensor
    """int32 `[T]`: places in these."""
    batch: PagedBatch
    """What they attend to at home."""

    def lengths(self, rows: Rows) -> torch.Tensor:
        """int64 `[T]`, as of `Model.hidden`: a recomputed token gets the one it had when it was
        computed first."""
        prompts = [s.prompt_len for s, count in rows for _ in range(count)]
        return torch.maximum(self.positions + 1, torch.tensor(prompts))

    def padded(self, rows: int, slot: int) -> Inputs:
        """With rows more, to be `rows` in all: of one token, whose KV goes to `slot`, and which
        attends to nothing."""
        batch = self.batch
        more = rows - batch.kv_len.numel()
        queries, listed = int(batch.query_start[-1]), int(batch.block_start[-1])
        return Inputs(
            pad(self.tokens, (0, more)),
            pad(self.positions, (0, more)),
            self.ends,
            pad(self.blocks, (0, more), value=slot),
            pad(self.offsets, (0, more)),
            PagedBatch(
                torch.cat((batch.query_start, torch.arange(1, more + 1).int() + queries)),
                pad(batch.query_position, (0, more)),
                pad(batch.block_start, (0, more), value=listed),
                batch.blocks,
                batch.first_token,
                pad(batch.kv_len, (0, more)),
            ),
        )


def read(rm: RManager, rows: Rows, block_size: int, apart: Container[int] = ()) -> Inputs:
    """The inputs of at least one row, which attends to all it has at home but the prefixes of
    `apart`."""
    own = [rm.tables[sequence.id] for sequence, _ in rows]
    tables, last = own, np.arange(len(rows))
    if rm.prefixes.prefixes:
        tables, last = _with_prefixes(rm, rows, own, apart)
    slots = _joined([table.slots for table in tables])
    sizes = _ints([len(table.slots) for table in tables])
    held = sizes[last]
    """rBlocks of each row's own table at home; the row's rBlocks end with them."""
    block_start = _starts(np.cumsum(sizes)[last])
    absent = _ints([table.absent for table in own])
    first = _ints([sequence.computed for sequence, _ in rows])
    count = _ints([count for _, count in rows])
    start = _starts(np.cumsum(count))
    shift = block_start[1:] - held - absent
    """Where logical rBlock 0 of a row would stand among the slots."""
    positions = first
    if start[-1] == len(rows):
        tokens = [sequence.tokens[sequence.computed] for sequence, _ in rows]
    else:
        tokens = [t for s, n in rows for t in s.tokens[s.computed : s.computed + n]]
        positions = np.repeat(first - start[:-1], count) + np.arange(start[-1])
        shift = np.repeat(shift, count)
    ending = first + count == _ints([len(sequence.tokens) for sequence, _ in rows])
    kv_len = first + count + (block_start[1:] - block_start[:-1] - held - absent) * block_size
    return Inputs(
        torch.tensor(tokens, dtype=torch.int64),
        torch.from_numpy(positions),
        torch.from_numpy(start[1:][ending] - 1),
        torch.from_numpy(slots[shift + positions // block_size]),
        _int32(positions % block_size),
        PagedBatch(
            query_start=_int32(start),
            query_position=_int32(first),
            block_start=_int32(block_start),
            blocks=torch.from_numpy(slots),
            first_token=torch.from_numpy(
                _joined([table.indices for table in tables]) * np.int32(block_size)
            ),
            kv_len=_int32(kv_len),
        ),
    )


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


def _with_prefixes(
    rm: RManager,
    rows: Rows,
    own: Sequence[BlockTable],
    apart: Container[int],
) -> tuple[list[BlockTable], Ints]:
    """The tables of all rows one after another, each row's own after those of its prefixes; and
    which ones are their own."""
    tables: list[BlockTable] = []
    last = []
    for (sequence, _), table in zip(rows, own, strict=True):
        chain = rm.prefixes.chain(sequence.id)
        tables += [prefix for prefix in chain if prefix.id not in apart] if apart else chain
        last.append(len(tables))
        tables.append(table)
    return tables, _ints(last)


def _starts(ends: Ints) -> Ints:
    """Where runs begin that end at `ends`, and where the last one ends."""
    starts = np.zeros(len(ends) + 1, np.int64)
    starts[1:] = ends
    return starts


def _joined(parts: Sequence[Slots]) -> NDArray[np.int32]:
    return np.frombuffer(bytearray().join(parts), np.int32)


def _ints(numbers: Sequence[int]) -> Ints:
    return np.array(numbers, np.int64)


def _int32(numbers: Ints) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.int32))
