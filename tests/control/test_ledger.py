"""The debt ledger against plain sets of edges and brute-force searches."""

from __future__ import annotations

import itertools

from debt_graphs import MOST, Debts, graphs, ledger_of, reaches
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.lending.ledger import DebtLedger

instances = st.integers(0, MOST - 1)
grants = st.tuples(instances, instances, st.integers(1, 9)).filter(lambda g: g[0] != g[1])
rows = instances.flatmap(
    lambda creditor: st.tuples(
        st.just(creditor),
        st.dictionaries(instances.filter(lambda d: d != creditor), st.integers(0, 9)),
    )
)


@given(st.lists(st.one_of(grants, rows), max_size=12))
def test_reports_replace_a_creditors_row_and_grants_add_to_it(changes):
    ledger, debts = DebtLedger(MOST), Debts()
    for change in changes:
        if len(change) == 3:
            debtor, creditor, blocks = change
            ledger.grant(debtor, creditor, blocks)
            debts[debtor, creditor] = debts.get((debtor, creditor), 0) + blocks
        else:
            creditor, lent = change
            ledger.set_lent(creditor, lent)
            debts = {pair: w for pair, w in debts.items() if pair[1] != creditor}
            debts |= {(debtor, creditor): w for debtor, w in lent.items() if w}
    assert {(d, c): w for d, c, w in ledger.pairs()} == debts
    assert len(list(ledger.pairs())) == len(debts)
    assert ledger.total == sum(debts.values())
    assert ledger.members() == {instance for pair in debts for instance in pair}
    for i in range(MOST):
        assert ledger.creditors_of(i) == {c: w for (d, c), w in debts.items() if d == i}
        assert ledger.debtors_of(i) == {d: w for (d, c), w in debts.items() if c == i}


@given(graphs)
def test_a_circle_closes_exactly_where_the_creditor_already_reaches_the_debtor(graph):
    n, debts = graph
    ledger = ledger_of(n, debts)
    for debtor, creditor in itertools.permutations(range(n), 2):
        closes = reaches(set(debts), creditor, debtor)
        assert ledger.closes_circle(debtor, creditor) == closes
        assert (creditor in ledger.owing(debtor)) == closes
