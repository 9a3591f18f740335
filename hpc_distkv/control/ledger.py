"""Who owes whom how many rBlocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class DebtLedger:
    """The global debt graph: an edge u → v of weight w says that instance u borrows w rBlocks
    from instance v (DistKV-LLM's debt ledger). The creditors' reports are the authority.
    """

    def __init__(self, instances: int) -> None:
        self.instances = instances
        self._lent: list[dict[int, int]] = [{} for _ in range(instances)]

    def set_row(self, creditor: int, lent: Mapping[int, int]) -> None:
        """What `creditor` reports to lend: debtor → rBlocks."""
        self._lent[creditor] = {debtor: blocks for debtor, blocks in lent.items() if blocks}

    def grant(self, debtor: int, creditor: int, blocks: int) -> None:
        """Enter a grant of this round."""
        row = self._lent[creditor]
        row[debtor] = row.get(debtor, 0) + blocks

    def pairs(self) -> Iterable[tuple[int, int, int]]:
        """(debtor, creditor, rBlocks) of every debt."""
        for creditor, row in enumerate(self._lent):
            for debtor, blocks in row.items():
                yield debtor, creditor, blocks

    def creditors(self, debtor: int) -> list[int]:
        """Instances that lend to `debtor`."""
        return [creditor for creditor, row in enumerate(self._lent) if debtor in row]

    def partners(self) -> list[set[int]]:
        """For every instance, those it has a loan with in either direction."""
        partners: list[set[int]] = [set() for _ in range(self.instances)]
        for debtor, creditor, _ in self.pairs():
            partners[debtor].add(creditor)
            partners[creditor].add(debtor)
        return partners

    def components(self) -> list[list[int]]:
        """Sets of instances that step together, each ascending."""
        partners, seen, components = self.partners(), set[int](), []
        for start in range(self.instances):
            if start in seen:
                continue
            component, todo = {start}, [start]
            while todo:
                new = partners[todo.pop()] - component
                component |= new
                todo += new
            seen |= component
            components.append(sorted(component))
        return components

    def closes_circle(self, debtor: int, creditor: int) -> bool:
        """Whether a debt of `debtor` to `creditor` would close a circle of debts: `creditor`
        already owes `debtor`, directly or through others."""
        seen, todo = {creditor}, [creditor]
        while todo:
            at = todo.pop()
            if at == debtor:
                return True
            new = set(self.creditors(at)) - seen
            seen |= new
            todo += new
        return False
