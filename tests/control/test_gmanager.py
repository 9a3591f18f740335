"""The gManager's plans against brute force, and its answers round by round."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.assign import Assignment
from hpc_distkv.control.borrow import CANDIDATES, Need, greedy_borrow
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.ledger import DebtLedger
from hpc_distkv.control.messages import (
    NOBODY,
    Counters,
    Report,
    Request,
    Result,
    Sampling,
    pack_tokens,
    unpack_tokens,
)

graphs = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.integers(1, 9)).filter(
                lambda e: e[0] != e[1]
            ),
            max_size=10,
        ),
    )
)


def ledger_of(n: int, edges: list[tuple[int, int, int]]) -> DebtLedger:
    ledger = DebtLedger(n)
    for debtor, creditor, blocks in edges:
        ledger.grant(debtor, creditor, blocks)
    return ledger


def reaches(n: int, edges: list[tuple[int, int, int]], start: int, goal: int) -> bool:
    """Brute force over all simple paths."""
    arcs = {(u, v) for u, v, _ in edges}
    others = [i for i in range(n) if i not in (start, goal)]
    return any(
        all(arc in arcs for arc in itertools.pairwise((start, *middle, goal)))
        for length in range(len(others) + 1)
        for middle in itertools.permutations(others, length)
    )


@given(graphs)
def test_a_circle_closes_exactly_where_the_creditor_already_reaches_the_debtor(graph):
    n, edges = graph
    ledger = ledger_of(n, edges)
    for debtor, creditor in itertools.permutations(range(n), 2):
        assert ledger.closes_circle(debtor, creditor) == reaches(n, edges, creditor, debtor)


@given(graphs)
def test_components_are_the_sets_joined_by_debts(graph):
    n, edges = graph
    components = ledger_of(n, edges).components()
    assert sorted(itertools.chain(*components)) == list(range(n))
    both_ways = edges + [(v, u, w) for u, v, w in edges]
    for a, b in itertools.combinations(range(n), 2):
        together = any(a in component and b in component for component in components)
        assert together == reaches(n, both_ways, a, b)


@given(
    graphs,
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5), st.integers(1, 20)), max_size=5),
    st.lists(st.integers(0, 12), min_size=6, max_size=6),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_grants_stay_within_promises_and_needs(graph, needs, promised, nodes):
    n, edges = graph
    wishes = {d: Need(age, d, blocks) for age, d, blocks in needs if d < n}
    ledger = ledger_of(n, edges)
    grants = greedy_borrow(list(wishes.values()), promised[:n], ledger, nodes[:n])
    for instance in range(n):
        given_away = sum(g.blocks for g in grants if g.creditor == instance)
        received = [g for g in grants if g.debtor == instance]
        wish = wishes[instance].blocks if instance in wishes else 0
        assert given_away <= promised[instance]
        assert sum(g.blocks for g in received) <= wish
        assert len(received) <= CANDIDATES
        assert all(g.creditor != instance and g.blocks > 0 for g in received)


def test_a_debtor_is_sent_to_its_own_node_first_then_to_where_most_is_promised():
    grants = greedy_borrow([Need(0, 0, 7)], [0, 3, 9, 5], DebtLedger(4), [0, 0, 1, 1])
    assert [(g.creditor, g.blocks) for g in grants] == [(1, 3), (2, 4)]


def test_a_circle_is_closed_only_if_nobody_else_can_lend():
    ledger = ledger_of(3, [(1, 0, 2)])
    assert [g.creditor for g in greedy_borrow([Need(0, 0, 4)], [0, 9, 3], ledger, [0, 0, 0])] == [
        2,
        1,
    ]


def test_the_oldest_request_is_served_first():
    grants = greedy_borrow([Need(5, 0, 4), Need(2, 1, 4)], [0, 0, 5], DebtLedger(3), [0, 0, 0])
    assert [(g.debtor, g.blocks) for g in grants] == [(1, 4), (0, 1)]


def request(number: int, prompt: int = 4, max_tokens: int = 4) -> Request:
    return Request(number, pack_tokens(range(prompt)), Sampling(max_tokens=max_tokens))


def test_rows_go_where_least_work_is():
    rows = [request(0, prompt=100), *(request(i, prompt=10) for i in range(1, 6))]
    given_rows = Assignment(iter(rows), 2).assign([9, 9], [1000, 1000])
    assert [[r.id for r in some] for some in given_rows] == [[0], [1, 2, 3, 4, 5]]


def test_rows_are_pulled_only_while_there_is_room():
    source = iter([request(i, prompt=10) for i in range(100)])
    assignment = Assignment(source, 2)
    given_rows = assignment.assign([3, 0], [1000, 1000])
    assert [len(rows) for rows in given_rows] == [3, 0]
    given_rows = assignment.assign([0, 50], [0, 25])
    assert [len(rows) for rows in given_rows] == [0, 3]
    assert next(source).id == 6
    assert not assignment.exhausted


def report(number: int, **fields: object) -> Report:
    base = Report(
        round=number,
        capacity=10,
        free=10,
        promised=0,
        wanted=0,
        wanted_for=NOBODY,
        starved=False,
        room_rows=1,
        room_tokens=100,
        lent={},
        held={},
        results=[],
        step_time=0.01,
        chunk_time=0.0,
        counters=Counters(),
    )
    return msgspec.structs.replace(base, **fields)


def test_a_job_stops_when_the_last_result_is_in():
    manager = GManager(iter([request(0)]), [0, 0])
    answers, _ = manager.round([report(0), report(0)])
    assert [len(a.assign) for a in answers] == [1, 0]
    assert not any(a.stop for a in answers)
    result = Result(0, pack_tokens([1, 2]), "stop", 0.1, 0.2)
    answers, results = manager.round([report(1, results=[result]), report(1)])
    assert results == [result]
    assert all(a.stop for a in answers)


def test_a_starved_request_makes_the_youngest_elsewhere_give_way_and_bars_admission():
    manager = GManager(iter([request(i) for i in range(4)]), [0, 0])
    manager.round([report(0, room_rows=2), report(0, room_rows=2)])
    held = [{0: {0: 9}, 2: {0: 1}}, {1: {1: 5}, 3: {1: 5}}]
    starving = report(1, held=held[0], wanted=3, wanted_for=0, starved=True)
    answers, _ = manager.round([starving, report(1, held=held[1])])
    assert answers[1].preempt == [3]
    assert [a.admit_before for a in answers] == [0, 0]


def test_the_victim_is_sought_first_where_the_starved_request_lives():
    manager = GManager(iter([request(i) for i in range(4)]), [0, 0, 0])
    manager.round([report(0), report(0), report(0, room_rows=2)])
    held = {1: {1: 5, 0: 4}}, {2: {2: 5}, 3: {2: 5}}
    starving = report(1, held={0: {0: 6}}, wanted=3, wanted_for=0, starved=True)
    answers, _ = manager.round([starving, report(1, held=held[0]), report(1, held=held[1])])
    assert [a.preempt for a in answers] == [[], [1], []]


def test_partners_count_the_same_steps_and_slow_components_do_not_set_the_pace():
    manager = GManager(iter(()), [0] * 5)
    lent = [{}, {0: 3}, {}, {2: 1}, {}]
    times = [0.01, 0.02, 0.5, 0.1, 0.01]
    answers, _ = manager.round(
        [report(0, lent=row, step_time=t) for row, t in zip(lent, times, strict=True)]
    )
    assert [a.partners for a in answers] == [[1], [0], [3], [2], []]
    assert [a.steps for a in answers] == [25, 25, 1, 1, 0]


def test_new_rows_are_reckoned_with_the_time_of_a_prompt_chunk():
    manager = GManager(iter([request(i) for i in range(2)]), [0, 0])
    lent = [{}, {0: 3}]
    rounds = [
        [report(0, lent=row, step_time=0.01, chunk_time=0.1) for row in lent],
        [report(1, lent=row, step_time=0.01, chunk_time=0.1, room_rows=0) for row in lent],
    ]
    steps = [[a.steps for a in manager.round(reports)[0]] for reports in rounds]
    assert steps == [[2, 2], [20, 20]]


def test_before_a_prompt_was_timed_a_round_is_one_step():
    manager = GManager(iter([request(0)]), [0, 0])
    answers, _ = manager.round([report(0), report(0, lent={0: 3})])
    assert [a.steps for a in answers] == [1, 1]


def test_a_stale_report_is_refused():
    manager = GManager(iter([request(0)]), [0])
    with pytest.raises(RuntimeError, match="reported for round 3 in round 0"):
        manager.round([report(3)])


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_token_ids_survive_the_wire(tokens):
    assert unpack_tokens(pack_tokens(tokens)) == tokens
