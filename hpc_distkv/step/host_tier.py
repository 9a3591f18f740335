"""rBlocks in the host's memory: a step's attention to them, and copies to and from there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

import torch

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, merge_rows, micro_attention
from hpc_distkv.comm.device import Event
from hpc_distkv.comm.transport import Comm
from hpc_distkv.decide.plan import Plan, Query, host_queries
from hpc_distkv.ids import TableKey
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.step.forward import Elsewhere
from hpc_distkv.step.inputs import guest_rows
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.staging import Staging, wait_for
from hpc_distkv.step.timesheet import Kind


class InPlace:
    """Attention of the host's processor to rBlocks in the host's memory, in place."""

    def __init__(self, comm: Comm, host_pool: BlockPool, specs: Sequence[AttentionSpec]) -> None:
        """`specs`: one for each layer."""
        self._comm, self._host_pool, self._specs = comm, host_pool, specs

    def begin(self, rows: list[PagedRow], tokens: list[int]) -> None:
        """Begin a step. `rows`: at least one; `tokens`: the step's tokens whose queries they are,
        in order."""
        self._batch = PagedBatch.build(rows)
        (self._tokens,) = self._comm.device.upload([torch.tensor(tokens, dtype=torch.int32)])

    def post_queries(self, q: torch.Tensor) -> None:
        """Fetch the rows of `q` `[tokens, heads, head_dim]` that ask."""
        self._queries = self._comm.device.fetch([q.index_select(0, self._tokens)])

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend, and merge the result into the rank's own, in place."""
        (queries,) = self._comm.waiter.until(self._queries.ready, f"queries of layer {layer}")
        cache = self._host_pool.layer(layer)
        parts = micro_attention(queries, *cache, self._batch, self._specs[layer], causal=False)
        merge_rows(out, lse, self._tokens, *self._comm.device.upload(parts))


class HostTier:
    """The host's memory is like a creditor inside the rank:

        moves       copies of the step's rBlocks asked for before layer 0, looked for after the last
        layer 0..n  queries asked for → the device attends to its own rBlocks meanwhile → the host's
                    processor attends to those in its memory → merged
                    or: copies of the layer's rBlocks → the device attends to these too → merged

    Which of the two is decided for each group, the queries of a step to the same rBlocks: a few are
    fastest in place, while one copy serves many, at the device's speed. So rBlocks are copied for
    groups of `staged_from` query rows and more (`Staging`; `host_costs` measures the number).

    What is copied is not written to before it has arrived: sealed rBlocks never are, and a slot
    changes its owner at the end of the step. So moves need no order but that.
    """

    def __init__(self, parts: Parts, host_pool: BlockPool, rmanager: RManager) -> None:
        self._comm, self._pool, self._time = parts.comm, parts.pool, parts.time
        self._host_pool, self._rm = host_pool, rmanager
        self._together = not parts.positional
        self._copies: list[Event] = []
        self._staged_from = parts.config.host_staged_from
        ours = parts.comm, host_pool, parts.model.attention
        self._in_place = InPlace(*ours)
        self._staging = Staging(*ours) if self._staged_from < math.inf else None

    def begin(self, plan: Plan) -> bool:
        """Launch the plan's copies. True if its layers attend to anything here."""
        in_place: list[list[Query]] = []
        staged: list[list[Query]] = []
        for _, queries in groupby(host_queries(self._rm, plan.scheduled), key=attrgetter("guests")):
            group = list(queries)
            copied = sum(query.rows for query in group) >= self._staged_from
            (staged if copied else in_place).append(group)
        self._ways: list[Elsewhere] = []
        if in_place:
            rows = [row for group in in_place for row in self._paged(group)]
            self._in_place.begin(rows, _tokens(in_place))
            self._ways.append(self._in_place)
        if staged and self._staging:
            self._staging.begin([self._paged(group) for group in staged], _tokens(staged))
            self._ways.append(self._staging)
        self._copies = []
        self._copying = len(plan.to_host) + len(plan.from_host)
        if self._copying:  # behind what layer 0 waits for
            self._time.enter(Kind.MOVES)
            self._copy(plan)
            self._time.leave(self._copying)
        return bool(self._ways)

    def post_queries(self, q: torch.Tensor) -> None:
        """Ask for the rows of `q` `[tokens, heads, head_dim]` that have rBlocks here."""
        for way in self._ways:
            way.post_queries(q)

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend to the rBlocks here, and merge the results into the rank's own, in place. What is
        not copied comes first: meanwhile copies arrive."""
        self._time.enter(Kind.HOST)
        for way in self._ways:
            way.merge(layer, out, lse)
        self._time.leave(layer)

    def finish(self) -> None:
        """Wait for the copies."""
        if self._copies:
            self._time.enter(Kind.MOVES)
            wait_for(self._comm, self._copies)
            self._time.leave(self._copying)

    def _copy(self, plan: Plan) -> None:
        slots, ours, hosts = self._rm.swap.slots, self._pool.rblock, self._host_pool.rblock
        for moves, leaving in ((plan.to_host, True), (plan.from_host, False)):
            here = [ours(move.slot) for move in moves]
            there = [hosts(slots[move.key][move.block]) for move in moves]
            if moves:
                pair = (here, there) if leaving else (there, here)
                self._copies.append(self._comm.device.copy_beside(*pair))

    def _paged(self, group: list[Query]) -> list[PagedRow]:
        asked = [query.asked for query in group]
        return guest_rows(asked, self._hosted, self._host_pool.block_size, self._together)

    def _hosted(self, keys: list[TableKey]) -> tuple[list[int], list[int]]:
        """Slots of what the tables of these requests and prefixes have here, and the logical index
        of each."""
        space, tables = self._rm.swap, self._rm.tables
        pairs = [(key, index) for key in keys for index in sorted(tables[key].in_host)]
        return [space.slots[key][index] for key, index in pairs], [index for _, index in pairs]


def _tokens(groups: Iterable[list[Query]]) -> list[int]:
    """Which of the step's tokens their queries are of."""
    return [query.first + row for group in groups for query in group for row in range(query.rows)]
