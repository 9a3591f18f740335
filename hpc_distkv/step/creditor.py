"""The creditor's side of debtors' steps: their queries attend to the guests here."""

from __future__ import annotations

import torch

from hpc_distkv.attention import PagedBatch, micro_attention
from hpc_distkv.comm.transport import TO_CREDITOR, TO_DEBTOR, Exchange
from hpc_distkv.control.messages.loans import Header
from hpc_distkv.decide.instance import Instance
from hpc_distkv.ids import InstanceId, TableKey
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.step.inputs import guest_rows
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.timesheet import Kind


class Creditor:
    """Serves the steps of a rank's debtors. Nothing here waits: `push` does what can be done now.
    It is called between the layers of own steps and in every wait. So a debtor never holds up its
    creditor, and two ranks that are each other's debtors never deadlock: whoever waits serves.
    """

    def __init__(self, parts: Parts, instance: Instance) -> None:
        self._parts, self._instance = parts, instance
        self._device, self._time = parts.comm.device, parts.time
        self._steps: dict[InstanceId, DebtorStep] = {}
        """Debtor → the step of it that is being served."""

    @property
    def idle(self) -> bool:
        """True if no debtor's step is being served."""
        return not self._steps

    def serves(self, debtor: InstanceId) -> bool:
        """True if a step of `debtor` is being served."""
        return debtor in self._steps

    def begin(self, debtor: InstanceId, header: Header, now: float) -> None:
        """Apply a header and serve its step from now on; the debtor's last one was committed.
        Raises ProtocolError."""
        with self._device.serving():
            self._steps[debtor] = DebtorStep(self._parts, self._instance, debtor, header, now)
        self._time.recorder.open(Kind.VISIT, debtor)

    def push(self) -> list[InstanceId]:
        """Push on every step. Returns the debtors whose step can be committed. Never blocks, and
        costs next to nothing if there is none."""
        if not self._steps:
            return []
        with self._device.serving():
            return [debtor for debtor, step in self._steps.items() if step.advance()]

    def served(self, debtor: InstanceId) -> bool:
        """True if the step of `debtor` can be committed. Never blocks."""
        with self._device.serving():
            return self._steps[debtor].advance()

    def commit(self, debtor: InstanceId) -> None:
        """The step of `debtor`, all of which was served, is over."""
        step = self._steps.pop(debtor)
        step.commit()
        self._time.recorder.close(Kind.VISIT, debtor, debtor, step.rows)


class DebtorStep:
    """One step of one debtor, seen from its creditor:

    header applied → moves of both directions posted
    layer 0..n     queries received → guests served → partial results posted
    then           moves have arrived: committed
    """

    def __init__(
        self, parts: Parts, instance: Instance, debtor: InstanceId, header: Header, now: float
    ) -> None:
        self._rank, self._debtor = parts.comm.world.rank_of(debtor), debtor
        self._comm, self._pool, self._instance = parts.comm, parts.pool, instance
        self._specs, self._time = parts.model.attention, parts.time
        self._moved = instance.accept(debtor, header, now)
        self._pending: list[Exchange] = []
        """Moves under way."""
        self._sending: Exchange | None = None
        """The partial results of the last layer that was served."""
        self._post_moves()
        self._layer = 0 if header.queries else self._pool.layers
        self.rows = rows = sum(count for _, count, _ in header.queries)
        """Query rows of a layer."""
        if header.queries:
            size, together = self._pool.block_size, not parts.positional
            self._guests = PagedBatch.build(
                guest_rows(header.queries, self._hosted, size, together)
            )
            shape, place = (rows, *parts.heads), self._pool.device
            self._queries = torch.empty(shape, dtype=self._pool.dtype, device=place)
            self._out = torch.empty(shape, device=place)
            self._lse = torch.empty(shape[:2], device=place)
            self._await_queries()

    def advance(self) -> bool:
        """Do what can be done now. True if the step can be committed."""
        while self._layer < self._pool.layers and self._arriving.done() and self._sent:
            self._serve()
        self._pending = [pending for pending in self._pending if not pending.done()]
        return self._layer >= self._pool.layers and not self._pending and self._sent

    @property
    def _sent(self) -> bool:
        """True if the tensors of partial results may be overwritten."""
        return self._sending is None or self._sending.done()

    def commit(self) -> None:
        """Record that the rBlocks are where they were moved to."""
        self._instance.commit_served(self._debtor, *self._moved)

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
        self._time.enter(Kind.SERVE)
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
        self._sending = self._comm.transport.exchange(partials, [], TO_DEBTOR, TO_CREDITOR)
        counters = self._instance.counters
        counters.bytes_queried += self._out.nbytes + self._lse.nbytes
        self._time.leave(self._debtor, self._layer - 1)

    def _hosted(self, guests: list[TableKey]) -> tuple[list[int], list[int]]:
        """Slots of these guests, and the logical index of each."""
        slots: list[int] = []
        indices: list[int] = []
        for key in guests:
            guest = self._instance.rm.lender.guests.get((self._debtor, key))
            if guest is None:
                raise ProtocolError(
                    f"instance {self._debtor} sends queries of request {key}, of which instance "
                    f"{self._instance.rm.instance} hosts nothing"
                )
            slots += guest.slots
            indices += guest.indices
        return slots, indices
