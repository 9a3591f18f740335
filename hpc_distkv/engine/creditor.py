"""What a rank does for its debtors, beside its own steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import msgspec
import torch

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, micro_attention
from hpc_distkv.comm.transport import TO_CREDITOR, TO_DEBTOR, Comm, Pending
from hpc_distkv.control.messages import Credit, Header
from hpc_distkv.engine.instance import Instance
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.memory.pool import BlockPool

Letter = Header | Credit


class Creditor:
    """Serves the steps of a rank's debtors. Nothing here waits: `attend` does what can be done now
    and is called between the layers of own steps and in every wait, so a debtor never holds up its
    creditor, and ranks that are debtor and creditor of each other never hold up each other for
    ever: whoever waits serves.
    """

    def __init__(
        self,
        comm: Comm,
        pool: BlockPool,
        instance: Instance,
        shape: tuple[int, int],
        specs: Sequence[AttentionSpec],
    ) -> None:
        """`shape`: query heads and head dimension of the shard; `specs`: one for each layer."""
        self._comm, self._pool, self._instance = comm, pool, instance
        self._shape, self._specs = shape, specs
        self._waiting: dict[int, deque[Header]] = {}
        """Debtor's rank → its headers that were not begun."""
        self._visits: dict[int, Visit] = {}
        """Debtor's rank → the step of it that is being served."""

    @property
    def idle(self) -> bool:
        """Whether no debtor's step is being served."""
        return not self._visits

    def open_credits(self) -> None:
        """Tell debtors of the rBlocks that are set aside for them."""
        for debtor, blocks in self._instance.credits().items():
            letter = msgspec.msgpack.encode(Credit(blocks))
            self._comm.mail.post(self._comm.world.rank_of(debtor), letter)

    def attend(self) -> None:
        """Read the mail and push on every visit. Never blocks. Raises ProtocolError."""
        while (letter := self._comm.mail.poll()) is not None:
            self._read(*letter)
        self.serve()

    def serve(self) -> None:
        """Push on every visit. Never blocks, and costs next to nothing if there is none."""
        for rank in list(self._visits):
            while (visit := self._visits.get(rank)) is not None and visit.advance():
                del self._visits[rank]
                self._begin_next(rank)

    def _read(self, rank: int, letter: bytes) -> None:
        try:
            message: Letter = msgspec.msgpack.decode(letter, type=Letter)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the mail of rank {rank} is malformed: {error}") from error
        if isinstance(message, Credit):
            self._instance.open_credit(rank // self._comm.world.tp, message.blocks)
            return
        self._waiting.setdefault(rank, deque()).append(message)
        if rank not in self._visits:
            self._begin_next(rank)

    def _begin_next(self, rank: int) -> None:
        if headers := self._waiting.get(rank):
            self._visits[rank] = Visit(
                rank,
                headers.popleft(),
                self._comm,
                self._pool,
                self._instance,
                self._shape,
                self._specs,
            )


class Visit:
    """One step of one debtor, seen from its creditor:

    header applied → moves of both directions posted
    layer 0..n     queries received → guests served → partial results posted
    then           moves have arrived: committed
    """

    def __init__(
        self,
        rank: int,
        header: Header,
        comm: Comm,
        pool: BlockPool,
        instance: Instance,
        shape: tuple[int, int],
        specs: Sequence[AttentionSpec],
    ) -> None:
        self._rank, self._debtor = rank, rank // comm.world.tp
        self._comm, self._pool, self._instance, self._specs = comm, pool, instance, specs
        self._moved = instance.accept(self._debtor, header, time.monotonic())
        self._pending: list[Pending] = []
        """Moves and partial results under way."""
        self._post_moves()
        self._layer = 0 if header.queries else pool.layers
        if header.queries:
            rows = sum(count for _, count, _ in header.queries)
            heads, head_dim = shape
            self._guests = PagedBatch.build([self._guest(*query) for query in header.queries])
            self._queries = torch.empty((rows, heads, head_dim), dtype=pool.dtype)
            # A debtor sends queries of a layer after it has the partial results of the last one.
            self._out = torch.empty((rows, heads, head_dim))
            self._lse = torch.empty((rows, heads))
            self._await_queries()

    def advance(self) -> bool:
        """Do what can be done now. Returns whether that was the last of it."""
        while self._layer < self._pool.layers and self._arriving.done():
            self._serve()
        self._pending = [pending for pending in self._pending if not pending.done()]
        if self._layer < self._pool.layers or self._pending:
            return False
        self._instance.commit_served(self._debtor, *self._moved)
        return True

    def _post_moves(self) -> None:
        outgoing, incoming = self._moved
        sends = [(self._rank, self._pool.rblock(move.slot)) for move in outgoing]
        recvs = [(self._rank, self._pool.rblock(move.slot)) for move in incoming]
        if sends or recvs:
            self._pending.append(
                self._comm.transport.exchange(sends, recvs, TO_DEBTOR, TO_CREDITOR)
            )

    def _await_queries(self) -> None:
        received = [(self._rank, self._queries)]
        self._arriving = self._comm.transport.exchange([], received, TO_DEBTOR, TO_CREDITOR)

    def _serve(self) -> None:
        started = time.perf_counter()
        k_cache, v_cache = self._pool.layer(self._layer)
        micro_attention(
            self._queries,
            k_cache,
            v_cache,
            self._guests,
            self._specs[self._layer],
            causal=False,
            out=self._out,
            lse=self._lse,
        )
        self._layer += 1
        if self._layer < self._pool.layers:
            self._await_queries()
        partials = [(self._rank, self._out), (self._rank, self._lse)]
        self._pending.append(self._comm.transport.exchange(partials, [], TO_DEBTOR, TO_CREDITOR))
        counters = self._instance.counters
        counters.bytes_queried += self._out.nbytes + self._lse.nbytes
        counters.serve_time += time.perf_counter() - started

    def _guest(self, request: int, rows: int, position: int) -> PagedRow:
        guest = self._instance.rm.guests.get((self._debtor, request))
        if guest is None:
            raise ProtocolError(
                f"instance {self._debtor} sends queries of request {request}, of which instance "
                f"{self._instance.rm.instance} hosts nothing"
            )
        size = self._pool.block_size
        return PagedRow(
            queries=rows,
            query_position=position,
            blocks=guest.slots,
            first_token=[index * size for index in guest.indices],
            kv_len=len(guest.slots) * size,
        )
