"""What a rank exchanges with its loan partners in one step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from hpc_distkv.attention import PagedBatch, PagedRow, merge_rows, micro_attention
from hpc_distkv.comm.transport import Comm, Pairs, Pending
from hpc_distkv.control.messages import Header
from hpc_distkv.engine.instance import Instance
from hpc_distkv.engine.scheduler import Plan
from hpc_distkv.memory.loan import Move, ProtocolError
from hpc_distkv.memory.pool import BlockPool


@dataclass(frozen=True)
class Peer:
    """The part of a step's traffic that goes to or comes from one partner."""

    rank: int
    queries: torch.Tensor
    """`[rows, heads, head_dim]` in the model's dtype: contiguous."""
    out: torch.Tensor
    """`[rows, heads, head_dim]` float32: their partial results."""
    lse: torch.Tensor
    """`[rows, heads]` float32."""


class Traffic:
    """One joint step with all partners. The order on every rank, and between any two partners:

        header      posted to every partner, then taken from every partner
        moves       the rBlocks of the headers, posted before layer 0, awaited after the last
        layer 0..n  queries to creditors posted ∥ queries of debtors received
                      → own attention runs meanwhile
                    guests served → partials to debtors posted ∥ partials of creditors received

    Both sides read the same two headers, so both know every size and the order of every message
    before layer 0. It cannot deadlock: each send is posted before its sender waits for anything of
    the same hop, a hop waits only for the partners' same hop, and a header only for the partner to
    have finished its previous joint step.
    """

    def __init__(
        self,
        comm: Comm,
        pool: BlockPool,
        instance: Instance,
        shape: tuple[int, int],
        scale: float,
    ) -> None:
        """`shape`: query heads and head dimension of the shard."""
        self._comm, self._pool, self._instance = comm, pool, instance
        self._rm, self._counters = instance.rm, instance.counters
        self._shape, self._scale = shape, scale
        self._creditors: list[tuple[Peer, torch.Tensor]] = []
        self._debtors: list[Peer] = []
        self._partners: dict[int, int] = {}
        """Rank → instance."""
        self._moves: Pending | None = None
        self.served_kv = 0
        """KV tokens that decodes of debtors attend to here in this step."""
        self.served_prompts = False
        """Whether a debtor's prompt is served in this step."""

    @property
    def any_queries(self) -> bool:
        """Whether layers have to exchange anything in this step."""
        return bool(self._creditors or self._debtors)

    @property
    def waited(self) -> float:
        """Seconds waited for partners so far."""
        c = self._counters
        return c.header_wait + c.query_wait + c.partial_wait + c.move_wait

    # -- headers and moves ----------------------------------------------------------------------

    def announce(self, plan: Plan, partners: Sequence[int], step: int) -> None:
        """Post the header of a joint step to every partner."""
        self._step, self._plan = step, plan
        self._partners = {self._comm.world.rank_of(instance): instance for instance in partners}
        wanted: dict[int, list[tuple[int, list[int]]]] = {i: [] for i in partners}
        first = 0
        for sequence, count in plan.rows:
            for creditor in self._rm.tables[sequence.id].remote:
                wanted[creditor].append((sequence.id, list(range(first, first + count))))
            first += count
        now = time.monotonic()
        for rank, instance in self._partners.items():
            queries = [(request, len(rows)) for request, rows in wanted[instance]]
            header = self._instance.header(instance, plan, step, queries, now)
            self._comm.mail.post(rank, msgspec.msgpack.encode(header))
        self._lay_out_debts(wanted)

    def accept(self) -> None:
        """Take the partners' headers, apply them, lay out the buffers for guests and post the
        moves."""
        started = time.perf_counter()
        mail = self._comm.mail.take(list(self._partners), f"header, step {self._step}")
        self._counters.header_wait += time.perf_counter() - started
        headers = {self._partners[rank]: self._decode(rank, mail[rank]) for rank in self._partners}
        outgoing, incoming = self._instance.accept(headers, time.monotonic())
        self._lay_out_guests(headers)
        self._post_moves([*self._plan.moves, *outgoing], [*incoming, *self._plan.recalls])

    def _decode(self, rank: int, message: bytes) -> Header:
        try:
            header = msgspec.msgpack.decode(message, type=Header)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the header of rank {rank} is malformed: {error}") from error
        if header.step != self._step:
            raise ProtocolError(
                f"rank {rank} is at joint step {header.step}, "
                f"rank {self._comm.world.rank} at {self._step}"
            )
        return header

    def _post_moves(self, outgoing: Sequence[Move], incoming: Sequence[Move]) -> None:
        rank_of, rblock = self._comm.world.rank_of, self._pool.rblock
        self._counters.bytes_moved += sum(rblock(move.slot).nbytes for move in outgoing)
        self._moves = (
            self._comm.transport.exchange(
                [(rank_of(move.peer), rblock(move.slot)) for move in outgoing],
                [(rank_of(move.peer), rblock(move.slot)) for move in incoming],
            )
            if outgoing or incoming
            else None
        )

    def finish(self) -> None:
        """Wait for the moves; from here on they are served where they went."""
        if self._moves is not None:
            started = time.perf_counter()
            self._moves.wait(f"rBlocks, step {self._step}")
            self._counters.move_wait += time.perf_counter() - started
        self._instance.commit()

    # -- layout ---------------------------------------------------------------------------------

    def _buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, head_dim = self._shape
        return (
            torch.empty((rows, heads, head_dim), dtype=self._pool.dtype),
            torch.empty((rows, heads, head_dim)),
            torch.empty((rows, heads)),
        )

    def _lay_out_debts(self, wanted: dict[int, list[tuple[int, list[int]]]]) -> None:
        self._creditors = []
        for instance, requests in wanted.items():
            rows = [row for _, rows in requests for row in rows]
            if rows:
                peer = Peer(self._comm.world.rank_of(instance), *self._buffers(len(rows)))
                self._creditors.append((peer, torch.tensor(rows, dtype=torch.int32)))

    def _lay_out_guests(self, headers: dict[int, Header]) -> None:
        """All guests are served by one call, so their queries lie one after another in one buffer
        of which each debtor fills its part."""
        asking = {i: header.queries for i, header in headers.items() if header.queries}
        self._debtors = []
        self.served_kv, self.served_prompts = 0, False
        if not asking:
            return
        sizes = [sum(rows for _, rows in queries) for queries in asking.values()]
        self._served = self._buffers(sum(sizes))
        self._debtors = [
            Peer(self._comm.world.rank_of(instance), *part)
            for instance, *part in zip(
                asking, *(torch.split(buffer, sizes) for buffer in self._served), strict=True
            )
        ]
        guests = [
            self._guest(instance, request, rows)
            for instance, queries in asking.items()
            for request, rows in queries
        ]
        self._guests = PagedBatch.build(guests)
        self.served_kv = sum(guest.kv_len for guest in guests if guest.queries == 1)
        self.served_prompts = any(guest.queries > 1 for guest in guests)

    def _guest(self, debtor: int, request: int, rows: int) -> PagedRow:
        guest = self._rm.guests.get((debtor, request))
        if guest is None:
            raise ProtocolError(
                f"instance {debtor} sends queries of request {request}, of which instance "
                f"{self._rm.instance} hosts nothing"
            )
        size = self._pool.block_size
        return PagedRow(
            queries=rows,
            query_position=(max(guest.indices) + 1) * size,
            blocks=guest.slots,
            first_token=[index * size for index in guest.indices],
            kv_len=len(guest.slots) * size,
        )

    # -- layers ---------------------------------------------------------------------------------

    def post_queries(self, q: torch.Tensor | None) -> None:
        """Send the rows of `q` `[tokens, heads, head_dim]` that have rBlocks elsewhere."""
        sends: list[tuple[int, torch.Tensor]] = []
        if q is not None:
            for peer, rows in self._creditors:
                torch.index_select(q, 0, rows, out=peer.queries)
                sends.append((peer.rank, peer.queries))
        recvs: Pairs = [(peer.rank, peer.queries) for peer in self._debtors]
        self._counters.bytes_queried += sum(tensor.nbytes for _, tensor in sends)
        self._queries = self._comm.transport.exchange(sends, recvs)

    def serve(self, layer: int) -> None:
        """Attend the debtors' queries to their guests and return the partial results."""
        started = time.perf_counter()
        self._queries.wait(f"queries, layer {layer}, step {self._step}")
        self._counters.query_wait += time.perf_counter() - started
        if self._debtors:
            k_cache, v_cache = self._pool.layer(layer)
            queries, out, lse = self._served
            micro_attention(
                queries,
                k_cache,
                v_cache,
                self._guests,
                scale=self._scale,
                causal=False,
                out=out,
                lse=lse,
            )
        sends = [(p.rank, t) for p in self._debtors for t in (p.out, p.lse)]
        recvs = [(p.rank, t) for p, _ in self._creditors for t in (p.out, p.lse)]
        self._counters.bytes_queried += sum(tensor.nbytes for _, tensor in sends)
        self._partials = self._comm.transport.exchange(sends, recvs)

    def merge(self, layer: int, out: torch.Tensor | None, lse: torch.Tensor | None) -> None:
        """Merge the creditors' partial results into the rank's own, in place."""
        started = time.perf_counter()
        self._partials.wait(f"partial results, layer {layer}, step {self._step}")
        self._counters.partial_wait += time.perf_counter() - started
        if out is not None and lse is not None:
            for peer, rows in self._creditors:
                merge_rows(out, lse, rows, peer.out, peer.lse)
