"""A rank's own step, as far as it concerns the host's memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hpc_distkv.attention import AttentionSpec, PagedBatch, merge_rows, micro_attention
from hpc_distkv.comm.device import Event
from hpc_distkv.comm.transport import Comm
from hpc_distkv.engine.guests import guest_rows, host_queries
from hpc_distkv.engine.plan import Plan
from hpc_distkv.engine.recorder import Kind
from hpc_distkv.engine.timesheet import TimeSheet
from hpc_distkv.memory.loan import HOST
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.rmanager import RManager

MEASURED_BLOCKS = 8
"""rBlocks that are copied to and fro to measure how long that takes, ..."""
MEASUREMENTS = 3
"""... so many times; the median counts."""


def wait_for(comm: Comm, copies: Sequence[Event]) -> None:
    """Until these copies have arrived."""
    comm.waiter.until(
        lambda: all(copy.query() for copy in copies) or None,
        "rBlocks on their way to or from the host's memory",
    )


def copy_seconds(comm: Comm, pool: BlockPool, host_pool: BlockPool) -> float:
    """Measured seconds in which one rBlock leaves for the host's memory and comes back. Both pools
    are in use for nothing yet."""
    count = min(MEASURED_BLOCKS, pool.num_blocks, host_pool.num_blocks)
    here, there = map(pool.rblock, range(count)), map(host_pool.rblock, range(count))
    ours, hosts = list(here), list(there)
    times = []
    for _ in range(MEASUREMENTS):
        began = time.perf_counter()
        for sources, targets in ((ours, hosts), (hosts, ours)):
            wait_for(comm, [comm.device.copy_beside(sources, targets)])
        times.append((time.perf_counter() - began) / count)
    return sorted(times)[MEASUREMENTS // 2]


class HostTier:
    """The host's memory is like a creditor inside the rank:

        moves       copies of the step's rBlocks asked for before layer 0, looked for after the last
        layer 0..n  queries asked for → the device attends to its own rBlocks meanwhile → the host's
                    processor attends to those in its memory → merged

    What is copied is not written to before it has arrived: sealed rBlocks never are, and a slot
    changes its owner at the end of the step. So copies need no order but that.
    """

    def __init__(
        self,
        comm: Comm,
        pool: BlockPool,
        host_pool: BlockPool,
        rmanager: RManager,
        specs: Sequence[AttentionSpec],
        time: TimeSheet,
    ) -> None:
        """`specs`: one for each layer."""
        self._comm, self._pool, self._host_pool, self._rm = comm, pool, host_pool, rmanager
        self._specs, self._time = specs, time
        self._together = not any(spec.positional for spec in specs)
        self._copies: list[Event] = []

    def begin(self, plan: Plan) -> bool:
        """Ask for the plan's copies. Returns whether its layers have anything to attend to here."""
        self._copies = []
        self._copying = len(plan.to_host) + len(plan.from_host)
        if self._copying:
            self._time.enter(Kind.MOVES)
            self._copy(plan)
            self._time.leave(self._copying)
        queries = host_queries(self._rm, plan.rows)
        if queries:
            size = self._host_pool.block_size
            asked = [query.asked for query in queries]
            self._batch = PagedBatch.build(guest_rows(asked, self._hosted, size, self._together))
            rows = [query.first + row for query in queries for row in range(query.rows)]
            (self._rows,) = self._comm.device.upload([torch.tensor(rows, dtype=torch.int32)])
        return bool(queries)

    def post_queries(self, q: torch.Tensor) -> None:
        """Ask for the rows of `q` `[tokens, heads, head_dim]` that have rBlocks here."""
        self._queries = self._comm.device.fetch([q.index_select(0, self._rows)])

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend to the rBlocks here, and merge the result into the rank's own, in place."""
        self._time.enter(Kind.HOST)
        (queries,) = self._comm.waiter.until(self._queries.ready, f"queries of layer {layer}")
        cache = self._host_pool.layer(layer)
        parts = micro_attention(queries, *cache, self._batch, self._specs[layer], causal=False)
        merge_rows(out, lse, self._rows, *self._comm.device.upload(parts))
        self._time.leave(layer)

    def finish(self) -> None:
        """Wait for the copies."""
        if self._copies:
            self._time.enter(Kind.MOVES)
            wait_for(self._comm, self._copies)
            self._time.leave(self._copying)

    def _copy(self, plan: Plan) -> None:
        slots, ours, hosts = self._rm.host_space.slots, self._pool.rblock, self._host_pool.rblock
        for moves, leaving in ((plan.to_host, True), (plan.from_host, False)):
            here = [ours(move.slot) for move in moves]
            there = [hosts(slots[move.request][move.block]) for move in moves]
            if moves:
                pair = (here, there) if leaving else (there, here)
                self._copies.append(self._comm.device.copy_beside(*pair))

    def _hosted(self, keys: list[int]) -> tuple[list[int], list[int]]:
        """Slots of what the tables of these requests and prefixes have here, and the logical index
        of each."""
        space, tables = self._rm.host_space, self._rm.tables
        pairs = [(key, index) for key in keys for index in sorted(tables[key].remote[HOST])]
        return [space.slots[key][index] for key, index in pairs], [index for _, index in pairs]
