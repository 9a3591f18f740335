"""Who owes whom how many rBlocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

from hpc_distkv.ids import InstanceId


class DebtLedger:
    """The global debt graph: an edge u → v of weight w says that instance u borrows w rBlocks
    from instance v (DistKV-LLM's debt ledger). The creditors' reports are the authority.

    Indexed both ways: a call costs what it returns or changes, however many instances there are.
    The mappings and sets it hands out are live views, to be read before the next change.
    """

    def __init__(self, instances: int) -> None:
        self.total = 0
        """rBlocks of all debts."""
        self._lent: list[dict[int, int]] = [{} for _ in range(instances)]
        self._owed: list[dict[int, int]] = [{} for _ in range(instances)]
        self._members: set[int] = set()

    def set_lent(self, creditor: int, lent: Mapping[InstanceId, int]) -> None:
        """What `creditor` reports to lend: debtor → rBlocks."""
        for debtor in self._lent[creditor].keys() - lent.keys():
            self._put(debtor, creditor, 0)
        for debtor, blocks in lent.items():
            self._put(debtor, creditor, blocks)

    def grant(self, debtor: int, creditor: int, blocks: int) -> None:
        """Enter a grant of this round."""
        self._put(debtor, creditor, self._lent[creditor].get(debtor, 0) + blocks)

    def creditors_of(self, debtor: int) -> Mapping[int, int]:
        """Creditor → rBlocks that `debtor` borrows from it."""
        return self._owed[debtor]

    def debtors_of(self, creditor: int) -> Mapping[int, int]:
        """Debtor → rBlocks that `creditor` lends to it."""
        return self._lent[creditor]

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """(debtor, creditor, rBlocks) of every debt."""
        for creditor in self._members:
            for debtor, blocks in self._lent[creditor].items():
                yield debtor, creditor, blocks

    def members(self) -> AbstractSet[int]:
        """Instances that borrow or lend."""
        return self._members

    def closes_circle(self, debtor: int, creditor: int) -> bool:
        """Whether a debt of `debtor` to `creditor` would close a circle of debts: `creditor`
        already owes `debtor`, directly or through others."""
        return debtor in _reachable(creditor, self.creditors_of)

    def owing(self, creditor: int) -> set[int]:
        """`creditor` and all that owe it, directly or through others: those it cannot borrow from
        without closing a circle of debts."""
        return _reachable(creditor, self.debtors_of)

    def _put(self, debtor: int, creditor: int, blocks: int) -> None:
        lent, owed = self._lent[creditor], self._owed[debtor]
        self.total += blocks - lent.get(debtor, 0)
        if blocks:
            lent[debtor] = owed[creditor] = blocks
        else:
            lent.pop(debtor, None)
            owed.pop(creditor, None)
        for instance in (debtor, creditor):
            if self._owed[instance] or self._lent[instance]:
                self._members.add(instance)
            else:
                self._members.discard(instance)


def _reachable(start: int, onward: Callable[[int], Iterable[int]]) -> set[int]:
    """`start` and every instance that steps `onward` lead to."""
    reached, todo = {start}, [start]
    while todo:
        for instance in onward(todo.pop()):
            if instance not in reached:
                reached.add(instance)
                todo.append(instance)
    return reached
