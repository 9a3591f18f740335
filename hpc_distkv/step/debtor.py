"""The debtor's side of a step: queries to creditors, their partial results, moves of rBlocks."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from hpc_distkv.attention import merge_rows
from hpc_distkv.comm.transport import TO_CREDITOR, TO_DEBTOR, Exchange
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import Plan, remote_queries
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.timesheet import Kind


@dataclass(frozen=True)
class CreditorExchange:
    """The tensors that go to one creditor in every layer of a step, and come back."""

    rank: int
    rows: torch.Tensor
    """int32 `[rows]`: which of the step's tokens."""
    queries: torch.Tensor
    """`[rows, heads, head_dim]` in the model's dtype: contiguous."""
    out: torch.Tensor
    """`[rows, heads, head_dim]` float32: the creditor's partial results."""
    lse: torch.Tensor
    """`[rows, heads]` float32."""


class Debtor:
    """The step of a rank that has rBlocks on creditors. It sends each of them, in this order:

        header      by mail, from leader to leader
        moves       the rBlocks of the header, posted before layer 0, awaited after the last
        layer 0..n  queries posted → own attention runs meanwhile → partial results awaited, merged

    `Creditor` on the other side knows the header, so it knows every size and the order of every
    message. A debtor waits for its creditors and for nobody else; a creditor waits for nobody.
    """

    def __init__(self, parts: Parts, instance: Instance) -> None:
        self._comm, self._pool, self._heads = parts.comm, parts.pool, parts.heads
        self._time, self._instance = parts.time, instance
        self._counters = instance.counters
        self._exchanges: list[CreditorExchange] = []
        self._moves: Exchange | None = None
        self._steps = 0

    def begin(self, plan: Plan, now: float) -> bool:
        """Send the step's headers and post its moves. True if its layers exchange anything."""
        self._steps += 1
        world = self._comm.world
        for creditor, header in self._instance.headers(plan, now).items():
            if world.lane == 0:
                self._comm.mail.post(world.rank_of(creditor), msgspec.msgpack.encode(header))
        self._post_moves(plan)
        queries = remote_queries(self._instance.rm, plan.scheduled)
        rows = [
            torch.tensor([q.first + i for q in each for i in range(q.rows)], dtype=torch.int32)
            for each in queries.values()
        ]
        peers = zip(map(world.rank_of, queries), self._comm.device.upload(rows), strict=True)
        self._exchanges = [self._exchange(*peer) for peer in peers]
        return bool(self._exchanges)

    def post_queries(self, q: torch.Tensor) -> None:
        """Send the rows of `q` `[tokens, heads, head_dim]` that have rBlocks elsewhere."""
        for each in self._exchanges:
            torch.index_select(q, 0, each.rows, out=each.queries)
        sends = [(each.rank, each.queries) for each in self._exchanges]
        partials = [(each.rank, part) for each in self._exchanges for part in (each.out, each.lse)]
        self._counters.bytes_queried += sum(tensor.nbytes for _, tensor in sends)
        self._partials = self._comm.transport.exchange(sends, partials, TO_CREDITOR, TO_DEBTOR)
        self._time.recorder.open(Kind.EXCHANGE)

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge the creditors' partial results into the rank's own, in place."""
        self._time.enter(Kind.PARTIALS)
        self._partials.wait(f"partial results, layer {layer}, step {self._steps}")
        self._time.leave(layer, len(self._exchanges))
        self._time.recorder.close(Kind.EXCHANGE, one=layer, other=len(self._exchanges))
        for each in self._exchanges:
            merge_rows(out, lse, each.rows, each.out, each.lse)

    def finish(self) -> None:
        """Wait for the moves."""
        if self._moves is not None:
            self._time.enter(Kind.MOVES)
            self._moves.wait(f"rBlocks, step {self._steps}")
            self._time.leave(self._moving)
            self._time.recorder.close(Kind.TRANSFER, one=self._moving)

    def _post_moves(self, plan: Plan) -> None:
        rank_of, rblock = self._comm.world.rank_of, self._pool.rblock
        sends = [(rank_of(move.peer), rblock(move.slot)) for move in plan.moves]
        recvs = [(rank_of(move.peer), rblock(move.slot)) for move in plan.recalls]
        self._moves = None
        if sends or recvs:
            self._counters.bytes_moved += sum(tensor.nbytes for _, tensor in (*sends, *recvs))
            self._moves = self._comm.transport.exchange(sends, recvs, TO_CREDITOR, TO_DEBTOR)
            self._moving = len(sends) + len(recvs)
            self._time.recorder.open(Kind.TRANSFER)

    def _exchange(self, rank: int, rows: torch.Tensor) -> CreditorExchange:
        shape, place = (len(rows), *self._heads), self._pool.device
        return CreditorExchange(
            rank,
            rows,
            torch.empty(shape, dtype=self._pool.dtype, device=place),
            torch.empty(shape, device=place),
            torch.empty(shape[:2], device=place),
        )
