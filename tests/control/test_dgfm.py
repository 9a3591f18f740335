"""DGFM against brute force on small debt graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from debt_graphs import MOST, Debts, graphs, has_circle, ledger_of
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.lending.dgfm import Recall, RecallPlan, plan_recalls
from hpc_distkv.control.lending.links import Links

UNLIMITED = 10**9
NEAR = Links([0] * MOST)

budgets = st.integers(0, 12)
spares = st.dictionaries(st.integers(0, MOST - 1), st.integers(0, 15))
urgents = st.sets(st.integers(0, MOST - 1))
places = st.lists(st.integers(0, 2), min_size=MOST, max_size=MOST)


def cancel_circles(n: int, debts: Debts, budget: int) -> list[Recall]:
    plan = RecallPlan(ledger_of(n, debts), budget)
    plan.cancel_circles()
    return plan.recalls()


def repay(graph: tuple[int, Debts], spare, links: Links, budget: int, urgent) -> list[Recall]:
    plan = RecallPlan(ledger_of(*graph), budget)
    plan.repay(spare, links, urgent)
    return plan.recalls()


def home(recalls: Iterable[Recall]) -> Counter[int]:
    """Instance → rBlocks it brings home."""
    total = Counter[int]()
    for recall in recalls:
        total[recall.debtor] += recall.blocks
    return total


def back(recalls: Iterable[Recall]) -> Counter[int]:
    """Instance → rBlocks it gives back."""
    total = Counter[int]()
    for recall in recalls:
        total[recall.creditor] += recall.blocks
    return total


def after(debts: Debts, recalls: list[Recall]) -> Debts:
    """What is owed when all recalls are carried out; each pair is recalled once, within its
    debt."""
    assert len({(r.debtor, r.creditor) for r in recalls}) == len(recalls)
    left = dict(debts)
    for debtor, creditor, blocks in recalls:
        assert 0 < blocks <= left[debtor, creditor]
        left[debtor, creditor] -= blocks
    return {pair: w for pair, w in left.items() if w}


def movable(debts: Debts, recalls: list[Recall], budget: int) -> set[tuple[int, int]]:
    """Debts that are left and that the budgets still let move."""
    came, went = home(recalls), back(recalls)
    return {(d, c) for d, c in after(debts, recalls) if came[d] < budget and went[c] < budget}


@given(graphs)
def test_without_a_budget_no_circle_is_left(graph):
    n, debts = graph
    recalls = cancel_circles(n, debts, UNLIMITED)
    assert not has_circle(set(after(debts, recalls)))
    assert bool(recalls) == has_circle(set(debts))


@given(graphs, budgets)
def test_within_budgets_no_circle_is_left_that_could_move(graph, budget):
    n, debts = graph
    recalls = cancel_circles(n, debts, budget)
    assert max(home(recalls).values(), default=0) <= budget
    assert not has_circle(movable(debts, recalls, budget))


@given(graphs, budgets)
def test_circles_change_nobodys_occupancy(graph, budget):
    n, debts = graph
    recalls = cancel_circles(n, debts, budget)
    assert home(recalls) == back(recalls)


@given(graphs, spares, places, budgets, urgents)
def test_repayment_brings_home_all_that_room_and_budgets_allow(graph, spare, nodes, budget, urgent):
    _, debts = graph
    recalls = repay(graph, spare, Links(nodes), budget, urgent)
    came, went = home(recalls), back(recalls)
    assert all(came[debtor] <= spare.get(debtor, 0) for debtor in came)
    assert max((came | went).values(), default=0) <= budget
    assert all(came[d] >= spare.get(d, 0) for d, _ in movable(debts, recalls, budget))


@given(graphs, spares, places, budgets, urgents)
def test_a_loan_is_passed_over_only_if_those_before_it_left_nothing(
    graph, spare, nodes, budget, urgent
):
    _, debts = graph
    recalls = repay(graph, spare, Links(nodes), budget, urgent)

    def pressing(pair: tuple[int, int]) -> tuple[bool, bool]:
        debtor, creditor = pair
        return creditor in urgent, nodes[debtor] != nodes[creditor]

    for debtor, creditor in after(debts, recalls):
        before = [
            r for r in recalls if pressing((r.debtor, r.creditor)) >= pressing((debtor, creditor))
        ]
        came, went = home(before)[debtor], back(before)[creditor]
        assert came == min(budget, spare.get(debtor, 0)) or went == budget


@given(graphs, spares, places, budgets, urgents)
def test_the_whole_plan_keeps_budgets_and_leaves_the_ledger_alone(
    graph, spare, nodes, budget, urgent
):
    n, debts = graph
    ledger = ledger_of(n, debts)
    recalls = plan_recalls(ledger, spare, Links(nodes), budget, urgent)
    assert {(d, c): w for d, c, w in ledger.pairs()} == debts
    assert max((home(recalls) | back(recalls)).values(), default=0) <= budget
    assert not has_circle(movable(debts, recalls, budget))
    repaid = {
        (r.debtor, r.creditor): r.blocks for r in repay(graph, spare, Links(nodes), budget, urgent)
    }
    rest = [Recall(d, c, blocks - repaid.get((d, c), 0)) for d, c, blocks in recalls]
    assert home(rest) == back(rest)
    assert all(r.blocks >= 0 for r in rest)


@given(graphs, spares)
def test_without_moves_nothing_is_recalled(graph, spare):
    n, debts = graph
    assert plan_recalls(ledger_of(n, debts), spare, NEAR, 0, set()) == []


def test_a_circle_loses_its_smallest_debt():
    debts = {(0, 1): 5, (1, 2): 3, (2, 0): 4, (3, 0): 9}
    recalls = cancel_circles(4, debts, UNLIMITED)
    assert sorted(recalls) == [(0, 1, 3), (1, 2, 3), (2, 0, 3)]


def test_creditors_short_of_memory_come_first_then_slow_links_then_small_debts():
    debts = {(0, 1): 4, (0, 2): 4, (0, 3): 3, (0, 4): 4}
    links = Links([0, 0, 1, 1, 0])
    recalls = repay((5, debts), {0: 13}, links, UNLIMITED, {1})
    assert recalls == [(0, 1, 4), (0, 3, 3), (0, 2, 4), (0, 4, 2)]


def test_repayment_comes_before_circles_and_both_share_a_recall():
    """0 has room for 2 of the 3 it owes; the third block goes around the circle."""
    debts = {(0, 1): 3, (1, 0): 5}
    assert plan_recalls(ledger_of(2, debts), {0: 2}, NEAR, UNLIMITED, set()) == [
        (0, 1, 3),
        (1, 0, 1),
    ]
    assert plan_recalls(ledger_of(2, debts), {0: 2}, NEAR, 2, set()) == [(0, 1, 2)]


def test_long_circles_need_no_deep_stack():
    n = 20_000
    debts = {(i, (i + 1) % n): 1 + i % 3 for i in range(n)}
    recalls = cancel_circles(n, debts, UNLIMITED)
    assert len(recalls) == n
    assert {r.blocks for r in recalls} == {1}
