"""Live migration of whole requests: the baseline that lending is measured against."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager

COPIED_BLOCKS = 8
"""rBlocks copied in one step; a request of which no more are left is handed over in that step."""
GROWTH_BLOCKS = 4
"""Credit beyond a request's rBlocks that it needs to migrate: it grows while it is copied."""


class Migrations:
    """The requests on their way to another instance. They are copied while they decode; the step
    that copies what is left, with the unsealed tail, is the only one they miss."""

    def __init__(self, rmanager: RManager, config: EngineConfig) -> None:
        self._rm = rmanager
        self._config = config
        self._target: dict[int, int] = {}
        """Migrating request → its next home."""
        self._idle: set[int] = set()
        """Creditors whose credit was of no use at the last report."""

    @property
    def active(self) -> bool:
        """Whether a request is on its way that has credit for all that is left of it."""
        return any(
            request in self._rm.tables
            and creditor in self._rm.borrower.debts
            and self._left(request) <= self._rm.borrower.debts[creditor].credit
            for request, creditor in self._target.items()
        )

    def return_credit(self) -> None:
        """Give back what no request has used between two reports: its creditor has other uses."""
        targets = set(self._target.values())
        idle = {c for c, d in self._rm.borrower.debts.items() if d.credit and c not in targets}
        for creditor in idle & self._idle:
            self._rm.borrower.return_credit(creditor, self._rm.borrower.debts[creditor].credit)
        self._idle = idle - self._idle

    def plan(self, running: Rows[Sequence], short: int) -> tuple[list[Move], list[Sequence]]:
        """Copies of this step, and the sequences that are handed over with it. `short`: rBlocks
        that should become free here."""
        debts = self._rm.borrower.debts
        tables = self._rm.tables  # What is in the host's memory cannot be copied from the pool.
        self._target = {
            r: c for r, c in self._target.items() if r in tables and not tables[r].remote_blocks
        }
        self._choose(running, short)
        moves: list[Move] = []
        leaving: list[Sequence] = []
        for sequence in running:
            creditor = self._target.get(sequence.id)
            if creditor is None or sequence.remaining != 1:
                continue
            left = self._left(sequence.id)
            copied = self._rm.tables[sequence.id].blocks - left
            if creditor not in debts or debts[creditor].credit < left:
                continue
            sealed = sequence.computed // self._config.block_size
            last = left <= COPIED_BLOCKS
            count = left if last else min(COPIED_BLOCKS, sealed - copied)
            moves += [self._rm.borrower.copy_out(sequence.id, creditor) for _ in range(count)]
            if last:
                leaving.append(sequence)
                del self._target[sequence.id]
        return moves, leaving

    def _choose(self, running: Rows[Sequence], short: int) -> None:
        """Send a decoding request to every creditor with credit: the smallest that frees what is
        short, or else the largest that finds room."""
        taken = set(self._target.values())
        for creditor, debt in self._rm.borrower.debts.items():
            if creditor in taken or debt.credit <= GROWTH_BLOCKS:
                continue
            sizes = [
                (self._rm.tables[s.id].blocks, s.id)
                for s in running
                if s.remaining == 1
                and s.id not in self._target
                and not self._rm.tables[s.id].remote_blocks
            ]
            fitting = [size for size in sizes if size[0] + GROWTH_BLOCKS <= debt.credit]
            enough = [size for size in fitting if size[0] >= short]
            if fitting:
                _, request = min(enough) if enough else max(fitting)
                self._target[request] = creditor

    def _left(self, request: int) -> int:
        """rBlocks left to copy."""
        copies = self._rm.borrower.copies.get(request)
        return self._rm.tables[request].blocks - (copies.blocks if copies else 0)
