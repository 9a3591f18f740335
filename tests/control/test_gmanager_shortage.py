"""The gManager's answers when instances are short of memory."""

from __future__ import annotations

from typing import Any

import pytest
from gmanager_rounds import Job, lends, requests, starving, uneven
from hypothesis import given
from hypothesis import strategies as st
from made_reports import report

from hpc_distkv.control.gmanager import PATIENCE
from hpc_distkv.control.messages.reports import Changes, Report
from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.control.policy import POLICIES, Policy

# -- loans --------------------------------------------------------------------------------------


def test_both_sides_of_a_grant_are_told():
    answers = Job(3).round(report(wanted=7, wanted_for=5), report(promised=4), report(promised=6))
    assert [answer.granted for answer in answers] == [7, 0, 0]
    assert [answer.lend for answer in answers] == [{}, {0: 1}, {0: 6}]


def test_the_oldest_request_is_served_first():
    answers = Job(3).round(
        report(wanted=4, wanted_for=5), report(wanted=4, wanted_for=2), report(promised=5)
    )
    assert [answer.granted for answer in answers] == [1, 4, 0]


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 50)), min_size=1, max_size=5
    ),
    st.sampled_from(sorted(POLICIES)),
)
def test_grants_stay_within_promises(instances, policy):
    job = Job(len(instances), policy=POLICIES[policy])
    reports = [
        report(promised=promised, wanted=wanted, wanted_for=age, longest=1, running=1, fixed=0.1)
        for promised, wanted, age in instances
    ]
    answers = job.round(*reports)
    for instance, (promised, _, _) in enumerate(instances):
        assert sum(answers[instance].lend.values()) <= promised
        received = sum(answer.lend.get(instance, 0) for answer in answers)
        assert answers[instance].granted == received
    debts = {(d, c): w for c, answer in enumerate(answers) for d, w in answer.lend.items()}
    assert {(d, c): w for d, c, w in job.manager.ledger.pairs()} == debts


def test_a_migrating_request_needs_room_for_all_of_itself():
    reports = report(wanted=2, wanted_for=1, longest=5), report(promised=10)
    assert Job(2, policy=POLICIES["migrate"]).round(*reports)[0].granted == 7
    assert Job(2).round(*reports)[0].granted == 2


def test_a_migrating_request_goes_to_one_creditor():
    reports = report(wanted=2, wanted_for=1, longest=5), report(promised=4), report(promised=5)
    assert Job(3, policy=POLICIES["migrate"]).round(*reports)[0].granted == 5
    assert Job(3).round(report(wanted=7, wanted_for=1), *reports[1:])[0].granted == 7


def test_what_a_creditor_reports_replaces_what_was_granted():
    job = Job(2)
    job.round(report(wanted=3), report(promised=5))
    job.round(report(), lends({0: 1}))
    assert [*job.manager.ledger.pairs()] == [(0, 1, 1)]
    job.round(report(), report())
    assert [*job.manager.ledger.pairs()] == [(0, 1, 1)]
    job.round(report(), lends({}))
    assert [*job.manager.ledger.pairs()] == []


# -- how far loans may go -----------------------------------------------------------------------


def granted(*reports: Report, **others: Any) -> dict[int, int]:
    """Creditor → what instance 0 gets of it; two instances on one node, a third on another."""
    answers = Job(3, nodes=[0, 0, 1], **others).round(*reports)
    return {i: answer.lend[0] for i, answer in enumerate(answers) if answer.lend}


def test_a_request_with_room_enough_nearby_waits_for_it():
    """The two pools on the node have a tenth more than 181 rBlocks, and not than 182."""
    pool = {"capacity": 100}
    wish = {"wanted": 5, "wanted_for": 0} | pool
    lenders = report(promised=2, **pool), report(promised=9, **pool)
    assert granted(report(**wish, largest=181), *lenders) == {1: 2}
    assert granted(report(**wish, largest=182), *lenders) == {1: 2, 2: 3}


def test_links_are_near_over_which_a_prompts_queries_take_no_longer_than_computing_it():
    def reaches_far(prompt_time: float) -> bool:
        lenders = report(promised=2), report(promised=9, prompt_time=prompt_time)
        short = report(wanted=5, wanted_for=0, largest=15, prompt_time=prompt_time)
        return 2 in granted(short, *lenders, exchange=[(0.0, c**2 * 5e-5) for c in range(3)])

    assert reaches_far(3e-4)
    assert not reaches_far(5e-5)


def test_victims_are_sought_where_their_room_is_of_use():
    younger = [report(youngest=3, youngest_blocks=9), report(youngest=8, youngest_blocks=9)]
    answers = Job(3, nodes=[0, 0, 1]).round(starving(3, largest=15), *younger)
    assert [answer.preempt for answer in answers] == [0, 3, 0]
    answers = Job(3, nodes=[0, 0, 1]).round(starving(3, largest=25), *younger)
    assert [answer.preempt for answer in answers] == [0, 0, 3]


def test_a_younger_row_that_holds_the_room_nearby_is_preempted_wherever_it_lives():
    """Its home is starved as well, so it never ends by itself. A younger one has nothing there."""
    guest = report(wanted=4, wanted_for=9, starved=True, free=0, youngest=9, youngest_blocks=20)
    rows = starving(3, largest=15), lends({2: 10}, free=0), guest
    far = report(youngest=10, youngest_blocks=20)
    answers = Job(4, nodes=[0, 0, 1, 1]).round(*rows, far)
    assert [answer.preempt for answer in answers] == [0, 0, 3, 0]


# -- starvation ---------------------------------------------------------------------------------


def test_a_starved_request_preempts_the_youngest_elsewhere_and_bars_admission():
    job = Job(3)
    for _ in range(PATIENCE):
        job.round(report(), report(), report())
    younger = [report(youngest=3, youngest_blocks=5), report(youngest=8, youngest_blocks=2)]
    answers = job.round(starving(3), *younger)
    assert [answer.admit_before for answer in answers] == [0, 0, 0]
    assert [answer.preempt for answer in answers] == [0, 1, 2], "the youngest first"
    assert all(answer.preempt_at is None for answer in answers)


def test_those_with_rblocks_at_the_starved_ones_home_are_preempted_first():
    job = Job(3)
    job.round(report(), report(), report())
    younger = [report(youngest=3, youngest_blocks=5), report(youngest=8, youngest_blocks=9)]
    answers = job.round(starving(3, changes=Changes(lent={1: 4})), *younger)
    assert [answer.preempt for answer in answers] == [0, 3, 0]
    assert answers[1].preempt_at == 0


def test_what_they_have_there_is_all_that_they_give():
    younger = [report(youngest=8, youngest_blocks=9), report(youngest=3, youngest_blocks=9)]
    answers = Job(3).round(starving(3, changes=Changes(lent={1: 1})), *younger)
    assert [(answer.preempt, answer.preempt_at) for answer in answers[1:]] == [(1, 0), (2, None)]


def test_neither_older_requests_nor_the_starved_one_are_preempted():
    job = Job(3)
    starved = starving(3, wanted_for=5, youngest=5, youngest_blocks=9)
    answers = job.round(starved, report(youngest=4, youngest_blocks=9), report())
    assert [answer.preempt for answer in answers] == [0, 0, 0]
    assert [answer.admit_before for answer in answers] == [5, 5, 5]


def test_the_oldest_of_two_starved_requests_counts():
    job = Job(3)
    answers = job.round(
        starving(3, wanted_for=5), starving(2, wanted_for=4), report(youngest=9, youngest_blocks=9)
    )
    assert answers[0].admit_before == 4
    assert answers[2].preempt == 2


def test_what_was_granted_needs_no_victims():
    """And if that is all, the next call need not wait."""
    job = Job(3)
    for wanted, missing in ((3, 0), (5, 2)):
        answers = job.round(
            starving(wanted), report(promised=3), report(youngest=9, youngest_blocks=9)
        )
        assert answers[0].granted == 3
        assert answers[2].preempt == missing


def test_victims_get_time_before_others_are_called():
    job = Job(2)
    rows = starving(1), report(youngest=3, youngest_blocks=1)
    called = [job.round(*rows)[1].preempt for _ in range(2 * PATIENCE)]
    assert called == [1, *[0] * (PATIENCE - 1)] * 2


def test_nothing_is_shed_while_somebody_starves():
    job = Job(3, requests(1), Policy(dgfm=False))
    answers = job.round(*uneven(promised=10), starving(5))
    assert answers[0].shed == {}
    assert answers[1].lend == {2: 5}


@pytest.mark.parametrize("policy", ["migrate", "queue", "isolated"])
def test_nobody_is_preempted_for_another_instance_without_lending(policy):
    job = Job(2, policy=POLICIES[policy])
    answers = job.round(starving(3), report(youngest=9, youngest_blocks=9))
    assert [answer.admit_before for answer in answers] == [NOBODY, NOBODY]
    assert answers[1].preempt == 0
