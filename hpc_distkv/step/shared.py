"""Attention of many rows to the rBlocks that they share, in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, merge_rows, micro_attention
from hpc_distkv.comm.device import Device
from hpc_distkv.ids import PrefixId
from hpc_distkv.memory.prefix import Prefix
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.step.inputs import Rows
from hpc_distkv.step.sizes import MOST_SHARED

LEAST_SAVED = 8192
"""KV tokens that rows together have to be spared from reading: less costs no more than a further
call and its merge. Measured on Zen 4 with 3 KV heads of dimension 64."""
LEAST_SAVED_REPLAYED = 1 << 18
"""The same where a step would otherwise be replayed: its launches one by one take milliseconds, in
which a GPU reads about so many tokens. An estimate: not measured."""

Groups = dict[tuple[int, ...], list[Prefix]]
"""Rows of a step, by their place in it → the prefixes at home that these rows and no others use."""


def groups_of(rm: RManager, rows: Rows, block_size: int, replayable: bool = False) -> Groups:
    """Prefixes worth one shared attention call; `replayable`: in a step that would be replayed
    without."""
    least = LEAST_SAVED_REPLAYED if replayable else LEAST_SAVED
    if not rm.prefixes.prefixes:
        return {}
    readers: dict[PrefixId, list[int]] = {}
    for place, (sequence, _) in enumerate(rows):
        for prefix in rm.prefixes.chain(sequence.id):
            readers.setdefault(prefix.id, []).append(place)
    groups: Groups = {}
    for number, places in readers.items():
        prefix = rm.prefixes.prefixes[number]
        if len(places) > 1 and prefix.slots:
            groups.setdefault(tuple(places), []).append(prefix)
    spared = {
        group: (len(group) - 1) * sum(len(p.slots) for p in prefixes) * block_size
        for group, prefixes in groups.items()
    }
    chosen: Groups = {}
    taken = Counter[int]()
    for group in sorted(spared, key=lambda group: -spared[group]):
        if spared[group] >= least and all(taken[place] < MOST_SHARED for place in group):
            chosen[group] = groups[group]
            taken.update(group)
    return chosen


class SharedAttention:
    """One MicroAttention call of a step over all that several of its rows share: every group is one
    row of the batch, with the queries of all its rows. What they share is in the past of every one
    of them, so there is no causal mask, and their positions do not matter."""

    def __init__(self, groups: Groups, rows: Rows, block_size: int, device: Device) -> None:
        """`groups`: at least one."""
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + row.tokens)
        paged: list[PagedRow] = []
        asked: list[int] = []
        parts: list[slice] = []
        for turn in _turns(groups):
            first = len(asked)
            for places in turn:
                tokens = [t for place in places for t in range(starts[place], starts[place + 1])]
                paged.append(_paged_row(len(tokens), groups[places], block_size))
                asked += tokens
            parts.append(slice(first, len(asked)))
        (self._asked,) = device.upload([torch.tensor(asked, dtype=torch.int32)])
        self._turns = [(part, self._asked[part]) for part in parts]
        """Parts of the queries, and which of the step's tokens they are: each at most once."""
        self._batch = PagedBatch.build(paged)

    def merge(
        self,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        spec: AttentionSpec,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Merge the step's attention to what rows share into that to their own rBlocks, in place.
        q [tokens, heads, head_dim], `cache` the K and V of the layer, out and lse as of
        `micro_attention`."""
        asked = q.index_select(0, self._asked)
        part_out, part_lse = micro_attention(asked, *cache, self._batch, spec, causal=False)
        for part, tokens in self._turns:
            merge_rows(out, lse, tokens, part_out[part], part_lse[part])


def _turns(groups: Groups) -> list[list[tuple[int, ...]]]:
    """The groups' rows, cut into lists in which no row comes twice: as few as will do."""
    turns: list[list[tuple[int, ...]]] = []
    merged: dict[int, int] = {}
    """Row → turns it has had."""
    for places in groups:
        turn = max(merged.get(place, 0) for place in places)
        merged.update(dict.fromkeys(places, turn + 1))
        if turn == len(turns):
            turns.append([])
        turns[turn].append(places)
    return turns


def _paged_row(queries: int, prefixes: Sequence[Prefix], block_size: int) -> PagedRow:
    slots = [slot for prefix in prefixes for slot in prefix.slots]
    indices = [index for prefix in prefixes for index in prefix.indices]
    return PagedRow(
        queries=queries,
        query_position=0,
        blocks=slots,
        first_token=[index * block_size for index in indices],
        kv_len=len(slots) * block_size,
    )
