"""Greedy borrowing against a plain sort of all creditors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from debt_graphs import MOST, Debts, graphs, ledger_of, reaches
from hypothesis import given
from hypothesis import strategies as st
from made_reports import read, report

from hpc_distkv.control.lending.borrow import CANDIDATES, Need, greedy_borrow
from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.round import Round


class Grant(NamedTuple):
    debtor: int
    creditor: int
    blocks: int


class Noted(Round):
    """A round that notes what it grants, out of promises of so many rBlocks."""

    def __init__(self, promised: list[int], ledger: DebtLedger, links: Links) -> None:
        reports = read(*[report(capacity=n, free=n, promised=n) for n in promised])
        super().__init__(reports, ledger, links)
        self.grants: list[Grant] = []

    def grant(self, debtor: int, creditor: int, blocks: int) -> None:
        super().grant(debtor, creditor, blocks)
        self.grants.append(Grant(debtor, creditor, blocks))


needs_of_debtors = st.dictionaries(
    st.integers(0, MOST - 1), st.tuples(st.integers(0, 99), st.integers(1, 20))
)
per_instance = st.lists(st.integers(0, 12), min_size=MOST, max_size=MOST)
places = st.lists(st.integers(0, 2), min_size=MOST, max_size=MOST)


def by_sorting(
    needs: list[Need], promised: list[int], debts: Debts, nodes: list[int], switches: list[int]
) -> list[Grant]:
    grants, left, debts = [], list(promised), dict(debts)
    for _, debtor, wanted, *_ in sorted(needs):
        ranked = sorted(
            (
                reaches(set(debts), creditor, debtor),
                0 if nodes[creditor] == nodes[debtor] else 1,
                0 if switches[creditor] == switches[debtor] else 1,
                -left[creditor],
                creditor,
            )
            for creditor in range(len(left))
            if creditor != debtor and left[creditor]
        )
        for *_, creditor in ranked[:CANDIDATES]:
            if blocks := min(wanted, left[creditor]):
                wanted -= blocks
                left[creditor] -= blocks
                debts[debtor, creditor] = debts.get((debtor, creditor), 0) + blocks
                grants.append(Grant(debtor, creditor, blocks))
    return grants


@given(graphs, needs_of_debtors, per_instance, places)
def test_grants_are_those_of_a_sort_of_all_creditors(graph, wishes, promised, nodes):
    n, debts = graph
    needs = [Need(age, debtor, blocks) for debtor, (age, blocks) in wishes.items() if debtor < n]
    nodes, switches = nodes[:n], [node // 2 for node in nodes[:n]]
    ledger = ledger_of(n, debts)
    round = Noted(promised[:n], ledger, Links(nodes, switches))
    greedy_borrow(needs, round)
    assert round.grants == by_sorting(needs, promised[:n], debts, nodes, switches)
    for debtor, creditor, blocks in round.grants:
        debts[debtor, creditor] = debts.get((debtor, creditor), 0) + blocks
        promised[creditor] -= blocks
    assert {(d, c): w for d, c, w in ledger.pairs()} == debts
    assert round.promised.tolist() == promised[:n]


def borrow(needs: list[Need], promised: list[int], nodes: list[int], debts: Debts) -> list[Grant]:
    round = Noted(promised, ledger_of(len(nodes), debts), Links(nodes))
    greedy_borrow(needs, round)
    return round.grants


def test_a_debtor_is_sent_to_its_own_node_first_then_to_where_most_is_promised():
    grants = borrow([Need(0, 0, 7)], [0, 3, 9, 5], [0, 0, 1, 1], {})
    assert [(g.creditor, g.blocks) for g in grants] == [(1, 3), (2, 4)]


def test_a_circle_is_closed_only_if_nobody_else_can_lend():
    grants = borrow([Need(0, 0, 4)], [0, 9, 3], [0, 0, 0], {(1, 0): 2})
    assert [g.creditor for g in grants] == [2, 1]


def test_a_near_circle_is_worse_than_a_far_link():
    grants = borrow([Need(0, 0, 4)], [0, 9, 4], [0, 0, 1], {(1, 0): 2})
    assert [g.creditor for g in grants] == [2]


def test_the_oldest_request_is_served_first():
    grants = borrow([Need(5, 0, 4), Need(2, 1, 4)], [0, 0, 5], [0, 0, 0], {})
    assert [(g.debtor, g.blocks) for g in grants] == [(1, 4), (0, 1)]


def test_a_measurement_overrules_the_nodes():
    seconds = np.array([[0, 8e-6, 2e-6], [8e-6, 0, 8e-6], [2e-6, 8e-6, 0]])
    links = Links([0, 0, 1], seconds=seconds)
    round = Noted([0, 9, 9], DebtLedger(3), links)
    greedy_borrow([Need(0, 0, 4)], round)
    assert [g.creditor for g in round.grants] == [2]
