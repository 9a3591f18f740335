"""Small debt graphs, and searches through them that share nothing with the code under test."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from hpc_distkv.control.lending.ledger import DebtLedger

Debts = dict[tuple[int, int], int]
"""(debtor, creditor) → rBlocks."""

MOST = 6


def debts_of(instances: int) -> st.SearchStrategy[Debts]:
    pairs = list(itertools.permutations(range(instances), 2))
    return st.dictionaries(st.sampled_from(pairs), st.integers(1, 9), max_size=14)


graphs: st.SearchStrategy[tuple[int, Debts]] = st.integers(2, MOST).flatmap(
    lambda n: st.tuples(st.just(n), debts_of(n))
)


def ledger_of(instances: int, debts: Debts) -> DebtLedger:
    ledger = DebtLedger(instances)
    for (debtor, creditor), blocks in debts.items():
        ledger.grant(debtor, creditor, blocks)
    return ledger


def reaches(arcs: set[tuple[int, int]], start: int, goal: int) -> bool:
    """Brute force over all simple paths."""
    others = [i for i in range(MOST) if i not in (start, goal)]
    return any(
        all(arc in arcs for arc in itertools.pairwise((start, *middle, goal)))
        for length in range(len(others) + 1)
        for middle in itertools.permutations(others, length)
    )


def has_circle(arcs: set[tuple[int, int]]) -> bool:
    return any(reaches(arcs, v, u) for u, v in arcs)
