"""Live migration of whole requests: the baseline that lending is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

from hpc_distkv.control.messages.loans import Handover
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.state import State
from hpc_distkv.ids import InstanceId, RequestId
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager

COPIED_BLOCKS = 8
"""rBlocks copied in one step; a request of which no more are left is handed over in that step."""
GROWTH_BLOCKS = 4
"""Credit beyond a request's rBlocks that it needs to migrate: it grows while it is copied."""


class Migrations:
    """Chooses the requests that migrate to other instances. They are copied while they decode; the
    step that copies what is left, with the unsealed tail, is the only one they miss."""

    def __init__(self) -> None:
        self._target: dict[RequestId, InstanceId] = {}
        """Migrating request → its next home."""
        self._idle: set[InstanceId] = set()
        """Creditors whose credit was of no use at the last report."""

    def active(self, rm: RManager) -> bool:
        """True if a request is migrating that has credit for all that is left of it."""
        return any(
            request in rm.tables
            and creditor in rm.borrower.debts
            and _left(rm, request) <= rm.borrower.debts[creditor].credit
            for request, creditor in self._target.items()
        )

    def surplus(self, rm: RManager) -> dict[InstanceId, int]:
        """Creditor → credit that no request has used between two reports, to give back: the
        creditor has other uses for it."""
        targets = set(self._target.values())
        idle = {c for c, d in rm.borrower.debts.items() if d.credit and c not in targets}
        surplus = {creditor: rm.borrower.debts[creditor].credit for creditor in idle & self._idle}
        self._idle = idle - self._idle
        return surplus

    def plan(self, state: State, short: int) -> tuple[list[Move], list[Sequence]]:
        """Copies of this step, and the sequences that are handed over with it. `short`: rBlocks
        that should become free here."""
        rm, running = state.rm, state.running
        debts, tables = rm.borrower.debts, rm.tables
        # What is in the host's memory cannot be copied from the pool.
        self._target = {
            r: c for r, c in self._target.items() if r in tables and not tables[r].remote_blocks
        }
        self._choose(rm, running, short)
        moves: list[Move] = []
        leaving: list[Sequence] = []
        for sequence in running:
            creditor = self._target.get(sequence.id)
            if creditor is None or sequence.remaining != 1:
                continue
            left = _left(rm, sequence.id)
            copied = tables[sequence.id].blocks - left
            if creditor not in debts or debts[creditor].credit < left:
                continue
            sealed = sequence.computed // state.config.block_size
            last = left <= COPIED_BLOCKS
            count = left if last else min(COPIED_BLOCKS, sealed - copied)
            moves += [rm.borrower.copy_out(sequence.id, creditor) for _ in range(count)]
            if last:
                leaving.append(sequence)
                del self._target[sequence.id]
        return moves, leaving

    def _choose(self, rm: RManager, running: SequenceOf[Sequence], short: int) -> None:
        """Send a decoding request to every creditor with credit: the smallest that frees what is
        short, or else the largest that finds room."""
        tables, taken = rm.tables, set(self._target.values())
        for creditor, debt in rm.borrower.debts.items():
            if creditor in taken or debt.credit <= GROWTH_BLOCKS:
                continue
            able = [s.id for s in running if s.remaining == 1 and s.id not in self._target]
            sizes = [(tables[r].blocks, r) for r in able if not tables[r].remote_blocks]
            fitting = [size for size in sizes if size[0] + GROWTH_BLOCKS <= debt.credit]
            enough = [size for size in fitting if size[0] >= short]
            if fitting:
                _, request = min(enough) if enough else max(fitting)
                self._target[request] = creditor


def _left(rm: RManager, request: RequestId) -> int:
    """rBlocks left to copy."""
    copies = rm.borrower.copies.get(request)
    return rm.tables[request].blocks - (copies.blocks if copies else 0)


class Handovers:
    """The requests that this instance hands over to others, and those that it gets. One that comes
    back before the step that handed it over has ended here has to wait for that."""

    def __init__(self, rm: RManager, sequence: Callable[[Request, float], Sequence]) -> None:
        """`sequence`: makes one of a request and the moment at which it was assigned."""
        self._rm, self._sequence = rm, sequence
        self._adopted: list[RequestId] = []
        """Requests of which the gManager has to hear that they are here."""
        self._arriving: dict[InstanceId, list[Sequence]] = {}
        """Debtor → what the header that is being served hands over."""
        self._back: list[tuple[InstanceId, Sequence]] = []
        """What came back before the step that handed it over ended here."""

    def leave(self, sequences: SequenceOf[Sequence]) -> list[Sequence]:
        """The step that hands these over has ended. Returns those that came back meanwhile: they
        run here again."""
        for sequence in sequences:
            if sequence.id in self._adopted:  # Its next home says where it is.
                self._adopted.remove(sequence.id)
        back, self._back = self._back, []
        return [self._adopt(debtor, sequence) for debtor, sequence in back]

    def arrive(self, debtor: InstanceId, handovers: Iterable[Handover], now: float) -> None:
        """A header hands these over; their rBlocks are here when its step has ended."""
        self._arriving[debtor] = [self._restored(handover, now) for handover in handovers]

    def settle(self, debtor: InstanceId) -> list[Sequence]:
        """The step of that header has ended. Returns the sequences that run here from now on."""
        arrived = self._arriving.pop(debtor)
        self._back += [(debtor, s) for s in arrived if s.id in self._rm.tables]
        return [self._adopt(debtor, s) for s in arrived if s.id not in self._rm.tables]

    def take_adopted(self) -> list[RequestId]:
        """Requests that were handed over to this instance since the last call."""
        adopted, self._adopted = self._adopted, []
        return adopted

    def _adopt(self, debtor: InstanceId, sequence: Sequence) -> Sequence:
        self._rm.adopt(debtor, sequence.id)
        self._adopted.append(sequence.id)
        return sequence

    def _restored(self, handover: Handover, now: float) -> Sequence:
        def moment(age: float | None) -> float | None:
            return None if age is None else now - age

        sequence = self._sequence(handover.request, now - handover.assigned_age)
        sequence.restore(handover.tokens, handover.computed, handover.logprobs)
        sequence.first_token_at = moment(handover.first_token_age)
        sequence.last_token_at = moment(handover.last_token_age)
        return sequence


def handover(sequence: Sequence, now: float) -> Handover:
    """All that its next home has to know of a sequence; clocks differ, so moments are ages."""

    def age(moment: float | None) -> float | None:
        return None if moment is None else now - moment

    return Handover(
        request=sequence.request,
        tokens=sequence.packed,
        computed=sequence.computed,
        assigned_age=now - sequence.assigned_at,
        first_token_age=age(sequence.first_token_at),
        last_token_age=age(sequence.last_token_at),
        logprobs=sequence.packed_logprobs,
    )
