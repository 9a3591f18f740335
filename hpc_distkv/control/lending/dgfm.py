"""Which debtor brings rBlocks home: repayment, and the cancelling of circles of debts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import Links


class Recall(NamedTuple):
    """`debtor` brings `blocks` of its rBlocks home from `creditor`."""

    debtor: int
    creditor: int
    blocks: int


def plan_recalls(
    ledger: DebtLedger,
    spare: Mapping[int, int],
    links: Links,
    budget: int,
    urgent: AbstractSet[int],
) -> list[Recall]:
    """The recalls of one round: repayment, then the cancelling of circles on the debts and the
    budgets that remain. One recall per pair, most pressing first; `ledger` is only read. Arguments
    as of `RecallPlan`.

    Source: DGFM of DistKV-LLM, arXiv 2401.02669.
    """
    plan = RecallPlan(ledger, budget)
    plan.repay(spare, links, urgent)
    plan.cancel_circles()
    return plan.recalls()


class RecallPlan:
    """The recalls of one round so far, and what they leave of debts and budgets."""

    def __init__(self, ledger: DebtLedger, budget: int) -> None:
        """No instance brings home or gives back more than `budget` rBlocks."""
        self._owed = {
            debtor: dict(creditors)
            for debtor in sorted(ledger.members())
            if (creditors := ledger.creditors_of(debtor))
        }
        # Links carry both directions at once, hence a budget for each.
        self._home = defaultdict[int, int](lambda: budget)
        self._back = defaultdict[int, int](lambda: budget)
        self._recalled = Counter[tuple[int, int]]()

    def recalls(self) -> list[Recall]:
        """One per pair, in the order of planning."""
        return [Recall(*pair, blocks) for pair, blocks in self._recalled.items()]

    def repay(self, spare: Mapping[int, int], links: Links, urgent: AbstractSet[int]) -> None:
        """Bring home what debtors have room for: `spare`, debtor → free rBlocks of its own.

        Loans of `urgent` creditors, those short of memory, come first, then loans over the slowest
        links, then the smallest ones, so that pairs come apart.
        """
        loans = [
            (creditor not in urgent, -links.between(debtor, creditor), blocks, debtor, creditor)
            for debtor, free in spare.items()
            if free > 0
            for creditor, blocks in self._owed.get(debtor, {}).items()
        ]
        left = dict(spare)
        for *_, debtor, creditor in sorted(loans):
            blocks = min(left[debtor], self._room(debtor, creditor))
            if blocks > 0:
                left[debtor] -= blocks
                self._recall(debtor, creditor, blocks)

    def cancel_circles(self) -> None:
        """Cancel circles of debts until none is left among the debts that budgets let move. On a
        circle every instance brings home exactly as many rBlocks as it gives back, so nobody's
        occupancy changes.

        Depth-first search along debts that can move. It ends with an instance when all its debts
        lead to ended ones, which are on no circle, now or later: debts only shrink.
        """
        ended: set[int] = set()
        for start in self._owed:
            path: dict[int, None] = {}
            while start not in ended:
                at = next(reversed(path), start)
                path[at] = None
                creditor = self._onward(at, ended)
                if creditor is None:
                    ended.add(at)
                    del path[at]
                elif creditor in path:
                    circle = []
                    while creditor in path:
                        circle.append(path.popitem()[0])
                    self._cancel(circle)
                else:
                    path[creditor] = None

    def _onward(self, debtor: int, ended: AbstractSet[int]) -> int | None:
        """A creditor to go on to; debts that lead nowhere for good are forgotten."""
        creditors = self._owed.get(debtor, {})
        while creditors:
            creditor = next(iter(creditors))
            if creditor not in ended and self._room(debtor, creditor) > 0:
                return creditor
            del creditors[creditor]
        return None

    def _cancel(self, circle: list[int]) -> None:
        """`circle`: each instance owes the one before it, the first owes the last."""
        debts = [(debtor, circle[place - 1]) for place, debtor in enumerate(circle)]
        blocks = min(self._room(*debt) for debt in debts)
        for debtor, creditor in debts:
            self._recall(debtor, creditor, blocks)

    def _room(self, debtor: int, creditor: int) -> int:
        """rBlocks of this debt that can still move."""
        return min(self._owed[debtor][creditor], self._home[debtor], self._back[creditor])

    def _recall(self, debtor: int, creditor: int, blocks: int) -> None:
        self._owed[debtor][creditor] -= blocks
        self._home[debtor] -= blocks
        self._back[creditor] -= blocks
        self._recalled[debtor, creditor] += blocks
