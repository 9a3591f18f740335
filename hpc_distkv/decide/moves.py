"""Which rBlocks move to creditors in a step, and which come home."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.decide.state import State, sealed
from hpc_distkv.ids import InstanceId
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager


class Moves:
    """Chooses the rBlocks that move to creditors and those that come home. Moves that sequences
    wait for are made at once; those that the gManager planned keep to a budget, so that compute
    hides them. Owner of those plans."""

    def __init__(self) -> None:
        self._shed: dict[InstanceId, int] = {}
        """Creditor → rBlocks planned to move there."""
        self._recall: dict[InstanceId, int] = {}
        """Creditor → rBlocks planned to come home."""
        self._tokens = 0
        """KV tokens left of the budget."""

    def apply(self, answer: Answer) -> None:
        """Take what the gManager planned."""
        self._recall = dict(answer.recall)
        for creditor, blocks in answer.shed.items():
            self._shed[creditor] = self._shed.get(creditor, 0) + blocks

    def coming(self, rm: RManager) -> bool:
        """True if the next step may have moves."""
        return bool(rm.borrower.credit or any(self._recall.values()))

    def forget_plans(self) -> None:
        """Credit goes back to its creditors: plans to use it are void."""
        self._shed.clear()

    def sheddable(self, rm: RManager) -> dict[InstanceId, int]:
        """Creditor → rBlocks that are planned to move there and have credit."""
        debts = rm.borrower.debts
        shed = {c: min(n, debts[c].credit) for c, n in self._shed.items() if c in debts}
        return {creditor: blocks for creditor, blocks in shed.items() if blocks > 0}

    def plan(
        self, state: State, short: int, growth: Callable[[], int]
    ) -> tuple[list[Move], list[Move]]:
        """Moves of this step: out, of which `short` are waited for, and home, into room beyond the
        `growth` of the running sequences, in rBlocks."""
        config = state.config
        self._tokens = min(self._tokens, config.block_size) + config.move_budget
        out = self._out(state, short) if state.rm.borrower.credit else []
        return out, self._home(state, growth()) if any(self._recall.values()) else []

    def _out(self, state: State, short: int) -> list[Move]:
        """The oldest rBlocks of the longest sequences and prefixes, to a creditor that hosts the
        same one already if there is one. What many share goes last: all of them would ask for it
        in every step."""
        rm, size = state.rm, state.config.block_size
        shed, movable, readers = self.sheddable(rm), sealed(state), Counter[int]()
        for sequence in state.running:
            readers.update(rm.parts(sequence.id).keys())
        moves: list[Move] = []
        for key in sorted(movable, key=lambda key: movable[key] / readers[key], reverse=True):
            table = rm.tables[key]
            for index in islice(table.indices, movable[key]):
                if len(moves) < short and rm.borrower.credit:
                    creditor = max(
                        (c for c, debt in rm.borrower.debts.items() if debt.credit),
                        key=lambda c: (c in table.remote, rm.borrower.debts[c].credit),
                    )
                elif shed and self._afford(size):
                    creditor = next(iter(shed))
                else:
                    return moves
                moves.append(rm.borrower.move_out(key, index, creditor))
                if creditor in shed:  # It serves the plan, whatever it was made for.
                    self._shed[creditor] -= 1
                    shed = self.sheddable(rm)
        return moves

    def _home(self, state: State, growth: int) -> list[Move]:
        """Of the requests with fewest rBlocks at the creditor first."""
        moves: list[Move] = []
        rm, size = state.rm, state.config.block_size
        room = rm.slots.usable - growth
        for creditor in self._recall:
            hosted = [
                (len(table.remote[creditor]), request)
                for request, table in rm.tables.items()
                if creditor in table.remote
            ]
            blocks = [
                (request, index)
                for _, request in sorted(hosted)
                for index in rm.tables[request].remote[creditor]
            ]
            for request, index in blocks[: self._recall[creditor]]:
                if room <= len(moves) or not self._afford(size):
                    return moves
                moves.append(rm.borrower.bring_home(request, index, creditor))
                self._recall[creditor] -= 1
        return moves

    def _afford(self, tokens: int) -> bool:
        """Spend the budget for one more rBlock, of `tokens` tokens, that no sequence waits for."""
        if self._tokens < tokens:
            return False
        self._tokens -= tokens
        return True
