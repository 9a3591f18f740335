"""Which rBlocks move in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rows
from itertools import islice

from hpc_distkv.control.messages.answer import Answer
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager


class Moves:
    """Chooses the rBlocks that leave and those that come home. Moves that rows wait for are made at
    once; those that the gManager planned keep to a budget, so that they stay behind compute."""

    def __init__(self, rmanager: RManager, config: EngineConfig) -> None:
        self._rm = rmanager
        self._config = config
        self._shed: dict[int, int] = {}
        """Creditor → rBlocks planned to move there."""
        self._recall: dict[int, int] = {}
        """Creditor → rBlocks planned to come home."""
        self._tokens = 0
        """What is left of the budget."""

    def apply(self, answer: Answer) -> None:
        """What a control round planned."""
        self._recall = dict(answer.recall)
        for creditor, blocks in answer.shed.items():
            self._shed[creditor] = self._shed.get(creditor, 0) + blocks

    @property
    def coming(self) -> bool:
        """Whether a step may have moves."""
        return bool(self._rm.borrower.credit or any(self._recall.values()))

    def forget_plans(self) -> None:
        """Credit goes back to its creditors: nothing is planned with it any more."""
        self._shed.clear()

    def sealed(self, running: Rows[Sequence]) -> dict[int, int]:
        """Sequence or prefix of it → sealed rBlocks that are at home: they may travel."""
        size, tables = self._config.block_size, self._rm.tables
        own = {s.id: tables[s.id].place(s.computed // size) for s in running}
        return own | {p.id: len(p.slots) for p in self._rm.prefixes.used_by(own)}

    def sheddable(self) -> dict[int, int]:
        """Creditor → rBlocks that were planned to move there and have credit."""
        debts = self._rm.borrower.debts
        shed = {c: min(n, debts[c].credit) for c, n in self._shed.items() if c in debts}
        return {creditor: blocks for creditor, blocks in shed.items() if blocks > 0}

    def plan(
        self, running: Rows[Sequence], short: int, growth: Callable[[], int]
    ) -> tuple[list[Move], list[Move]]:
        """Moves of this step: out, of which `short` are waited for, and home, into room beyond the
        `growth` of what runs."""
        self._tokens = min(self._tokens, self._config.block_size) + self._config.move_budget
        out = self._out(running, short) if self._rm.borrower.credit else []
        return out, self._home(growth) if any(self._recall.values()) else []

    def _out(self, running: Rows[Sequence], short: int) -> list[Move]:
        """The oldest rBlocks of the longest sequences and prefixes, to a creditor that hosts the
        same one already if there is one. What many share goes last: all of them would ask for it
        in every step."""
        rm, shed = self._rm, self.sheddable()
        sealed, readers = self.sealed(running), Counter[int]()
        for sequence in running:
            readers.update(rm.parts(sequence.id).keys())
        moves: list[Move] = []
        for key in sorted(sealed, key=lambda key: sealed[key] / readers[key], reverse=True):
            table = rm.tables[key]
            for index in islice(table.indices, sealed[key]):
                if len(moves) < short and rm.borrower.credit:
                    creditor = max(
                        (c for c, debt in rm.borrower.debts.items() if debt.credit),
                        key=lambda c: (c in table.remote, rm.borrower.debts[c].credit),
                    )
                elif shed and self._afford():
                    creditor = next(iter(shed))
                else:
                    return moves
                moves.append(rm.borrower.move_out(key, index, creditor))
                if creditor in shed:  # it serves the plan, for whatever reason it was made
                    self._shed[creditor] -= 1
                    shed = self.sheddable()
        return moves

    def _home(self, growth: Callable[[], int]) -> list[Move]:
        """Of the requests with fewest rBlocks at the creditor first."""
        moves: list[Move] = []
        room = self._rm.slots.usable - growth()
        for creditor in self._recall:
            hosted = [
                (len(table.remote[creditor]), request)
                for request, table in self._rm.tables.items()
                if creditor in table.remote
            ]
            blocks = [
                (request, index)
                for _, request in sorted(hosted)
                for index in self._rm.tables[request].remote[creditor]
            ]
            for request, index in blocks[: self._recall[creditor]]:
                if room <= len(moves) or not self._afford():
                    return moves
                moves.append(self._rm.borrower.bring_home(request, index, creditor))
                self._recall[creditor] -= 1
        return moves

    def _afford(self) -> bool:
        """Spend the budget for one more move that no row waits for."""
        if self._tokens < self._config.block_size:
            return False
        self._tokens -= self._config.block_size
        return True
