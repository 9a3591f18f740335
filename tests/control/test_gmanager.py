"""The gManager's answers round by round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_reports import report

from hpc_distkv.control.gmanager import PATIENCE, PLAN_EVERY, RECALL_STEPS, GManager
from hpc_distkv.control.links import Links
from hpc_distkv.control.messages import (
    NOBODY,
    Answer,
    Changes,
    Counters,
    Report,
    Request,
    Result,
    Sampling,
    pack_tokens,
    unpack_tokens,
)
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.control.wire import ReportError, encode_report

GREEDY = POLICIES["lend-greedy"]
DGFM = Policy(planner=False)


def requests(count: int, prompt: int = 4, max_tokens: int = 4) -> list[Request]:
    sampling = Sampling(max_tokens=max_tokens)
    return [Request(number, pack_tokens(range(prompt)), sampling) for number in range(count)]


class Job:
    """A gManager, and the rounds with it."""

    def __init__(
        self,
        instances: int,
        rows: Iterable[Request] = (),
        policy: Policy = GREEDY,
        nodes: Sequence[int] = (),
        **others: Any,
    ) -> None:
        """All on one node but for `nodes`."""
        links = Links(nodes or [0] * instances)
        self.manager = GManager(iter(rows), links, instances, policy, **others)
        self.results: list[Result] = []

    def round(self, *reports: Report) -> list[Answer]:
        number = self.manager.round_number
        messages = [encode_report(msgspec.structs.replace(r, round=number)) for r in reports]
        answers, self.results = self.manager.round(messages)
        decoded = [msgspec.msgpack.decode(answer, type=Answer) for answer in answers]
        assert all(answer.round == number for answer in decoded)
        return decoded


def lends(row: dict[int, int], **fields: object) -> Report:
    return report(changes=Changes(lent=row), **fields)


# -- rows ---------------------------------------------------------------------------------------


def test_a_job_stops_when_the_last_result_is_in():
    job = Job(2, requests(1))
    answers = job.round(report(), report())
    assert [len(answer.assign) for answer in answers] == [1, 0]
    assert not any(answer.stop for answer in answers)
    assert not any(answer.stop for answer in job.round(report(), report()))
    result = Result(0, pack_tokens([1, 2]), "stop", 0.1, 0.2)
    answers = job.round(report(changes=Changes(results=[result])), report())
    assert job.results == [result]
    assert all(answer.stop for answer in answers)


def test_rows_arrive_as_they_were_given():
    rows = requests(3)
    answers = Job(1, rows).round(report(room_rows=9))
    assert answers[0].assign == rows


def test_isolated_instances_get_every_second_row():
    answers = Job(2, requests(5), POLICIES["isolated"]).round(report(room_rows=9), report())
    assert [[row.id for row in answer.assign] for answer in answers] == [[0, 2, 4], [1]]


def test_a_row_that_migrated_belongs_to_its_new_home():
    job = Job(2, requests(1), POLICIES["migrate"])
    job.round(report(), report())
    job.round(report(), report(changes=Changes(adopted=[0])))
    assert job.manager.assignment.home == {0: 1}
    result = Result(0, pack_tokens([1]), "stop", 0.1, 0.2)
    answers = job.round(report(), report(changes=Changes(results=[result])))
    assert all(answer.stop for answer in answers)


def test_a_row_may_be_adopted_and_finished_in_one_report():
    job = Job(2, requests(1), POLICIES["migrate"])
    job.round(report(), report())
    result = Result(0, pack_tokens([1]), "stop", 0.1, 0.2)
    answers = job.round(report(), report(changes=Changes(adopted=[0], results=[result])))
    assert all(answer.stop for answer in answers)


def test_figures_of_the_cluster_are_sums_and_counters_stay_until_new_ones_come():
    job = Job(2)
    counters = Counters(steps=7)
    job.round(report(running=3, free=4, changes=Changes(counters=counters)), report(running=2))
    job.round(report(running=3, free=4), report(running=2))
    assert (job.manager.running, job.manager.free, job.manager.capacity) == (5, 14, 20)
    assert job.manager.counters == [counters, Counters()]


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
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 50)), max_size=5),
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
    wish = {"wanted": 5, "wanted_for": 0}
    lenders = report(promised=2), report(promised=9)
    assert granted(report(**wish, largest=15), *lenders) == {1: 2}
    assert granted(report(**wish, largest=25), *lenders) == {1: 2, 2: 3}


def test_links_are_near_over_which_a_prompts_queries_take_no_longer_than_computing_it():
    def reaches_far(prompt_time: float) -> bool:
        lenders = report(promised=2), report(promised=9, prompt_time=prompt_time)
        short = report(wanted=5, wanted_for=0, largest=15, prompt_time=prompt_time)
        return 2 in granted(short, *lenders, exchange_seconds=lambda c, rows: c * rows * 1e-4)

    assert reaches_far(3e-4)
    assert not reaches_far(5e-5)


def test_victims_are_sought_where_their_room_is_of_use():
    younger = [report(youngest=3, youngest_blocks=9), report(youngest=8, youngest_blocks=9)]
    answers = Job(3, nodes=[0, 0, 1]).round(starving(3, largest=15), *younger)
    assert [answer.give_way for answer in answers] == [0, 3, 0]
    answers = Job(3, nodes=[0, 0, 1]).round(starving(3, largest=25), *younger)
    assert [answer.give_way for answer in answers] == [0, 0, 3]


@pytest.mark.xfail(strict=True, reason="victims are sought by where they live, not what they hold")
def test_a_younger_row_that_holds_the_room_nearby_gives_way_wherever_it_lives():
    """Its home is starved as well, so it never ends by itself."""
    guest = report(wanted=4, wanted_for=9, starved=True, free=0, youngest=9, youngest_blocks=20)
    answers = Job(3, nodes=[0, 0, 1]).round(starving(3, largest=15), lends({2: 10}, free=0), guest)
    assert answers[2].give_way > 0


# -- all at once --------------------------------------------------------------------------------


def whole(wanted: int, **fields: object) -> Report:
    return report(wanted=wanted, wanted_for=0, whole=True, largest=wanted, **fields)


def test_a_row_that_needs_all_at_once_gets_all_or_nothing():
    lenders = report(promised=2), report(promised=3), report(promised=1), report(promised=2)
    answers = Job(5).round(whole(8), *lenders)
    assert answers[0].granted == 8
    assert [sum(answer.lend.values()) for answer in answers[1:]] == [2, 3, 1, 2]
    answers = Job(5).round(whole(9), *lenders)
    assert answers[0].granted == 0
    assert not any(answer.lend for answer in answers)


def test_room_gathers_for_a_row_that_needs_all_at_once():
    answers = Job(3).round(whole(9), report(promised=2), report(promised=3))
    assert answers[0].keep == 0
    kept = answers[1].keep - 2, answers[2].keep - 3
    assert sum(kept) >= 9 - 2 - 3
    assert min(kept) > 0


def test_room_that_gathers_for_an_older_row_is_not_for_a_younger_one_that_needs_all_too():
    younger = msgspec.structs.replace(whole(4), wanted_for=7)
    answers = Job(4).round(whole(9), younger, report(promised=3), report(promised=3))
    assert [answer.granted for answer in answers] == [0, 0, 0, 0]


def test_a_row_that_waits_for_all_starves_only_when_nothing_runs_that_could_end():
    waiting = msgspec.structs.replace(whole(9), starved=True, wanted_for=0)
    answers = Job(2).round(waiting, report(running=1, youngest=4, youngest_blocks=5))
    assert [answer.give_way for answer in answers] == [0, 0]
    assert answers[0].admit_before == NOBODY
    answers = Job(2).round(waiting, report())
    assert answers[0].admit_before == 0


# -- loans that pay -----------------------------------------------------------------------------


def uneven(**others: object) -> tuple[Report, Report]:
    """A long row fills one instance, short rows half of another."""
    model = {"fixed": 0.01, "per_token": 0.001, "per_kv": 1e-5, "row_blocks": 2.5, "room_rows": 0}
    long = {"free": 0, "running": 1, "seats": 15, "kv_tokens": 3168, "longest": 99}
    short = {"free": 60, "promised": 50, "running": 16, "kv_tokens": 1280} | others
    return report(capacity=100, **model, **long), report(capacity=100, **model, **short)


def test_a_transfer_is_granted_out_of_the_promise_and_the_rest_is_kept_free():
    """The planner wants more than the creditor has promised: rows of it give way in time."""
    job = Job(2, requests(1), Policy(dgfm=False))
    debtor, creditor = job.round(*uneven(promised=10))
    assert creditor.lend == {0: 10}
    assert debtor.granted == 10
    assert debtor.shed == {1: 10}
    missing = creditor.keep
    assert missing > 1
    debtor, creditor = job.round(*uneven(promised=1, changes=Changes(lent={0: 10})))
    assert debtor.shed == {1: 1}
    assert creditor.keep == missing - 1


def test_plans_are_made_every_few_rounds():
    job = Job(2, requests(1), Policy(dgfm=False))
    job.round(report(room_rows=0), report(room_rows=0))  # nobody has stepped yet
    shed = [job.round(*uneven())[0].shed for _ in range(PLAN_EVERY)]
    assert [bool(blocks) for blocks in shed] == [False] * (PLAN_EVERY - 1) + [True]


def test_debtors_that_are_short_come_before_transfers_that_pay():
    job = Job(3, requests(1), Policy(dgfm=False))
    answers = job.round(*uneven(), report(wanted=50, wanted_for=9))
    assert answers[2].granted == 50
    assert answers[0].shed == {}


def test_without_a_planner_nothing_is_shed():
    debtor, creditor = Job(2, requests(1), DGFM).round(*uneven())
    assert debtor.shed == creditor.lend == {}
    assert creditor.keep == 0


# -- debts come home ----------------------------------------------------------------------------


def test_a_debtor_with_room_brings_its_rblocks_home():
    job = Job(2, policy=DGFM)
    answers = job.round(report(promised=3), lends({0: 5}))
    assert [answer.recall for answer in answers] == [{1: 3}, {}]


def test_without_dgfm_nothing_comes_home():
    assert Job(2).round(report(promised=3), lends({0: 5}))[0].recall == {}


def test_what_a_debtor_lends_to_one_that_is_short_is_not_there_to_bring_rblocks_home():
    job = Job(3, policy=DGFM)
    answers = job.round(report(promised=4), lends({0: 5}), report(wanted=3, wanted_for=0))
    assert answers[0].lend == {2: 3}
    assert answers[0].recall == {1: 1}


def test_new_rows_take_their_room_before_rblocks_come_home():
    job = Job(2, requests(1, prompt=64), DGFM)
    answers = job.round(report(promised=5, room_tokens=99), lends({0: 5}, room_rows=0))
    assert len(answers[0].assign) == 1
    assert answers[0].recall == {1: 5 - 64 // 32}


def test_loans_that_pay_stay():
    """Ten rows here would wait for 5 rBlocks more of attention, one row there waits for them."""
    model = {"fixed": 0.01, "per_token": 0.001, "per_kv": 1e-4}
    many = report(promised=5, running=10, kv_tokens=64, **model)
    few = lends({0: 5}, running=1, kv_tokens=224, **model)
    assert Job(2, policy=DGFM).round(many, few)[0].recall == {1: 5}
    assert Job(2, policy=Policy()).round(many, few)[0].recall == {}


def test_a_circle_is_cancelled_though_nobody_has_room():
    job = Job(3, policy=DGFM)
    answers = job.round(lends({1: 4}, free=0), lends({2: 3}, free=0), lends({0: 5}, free=0))
    assert [answer.recall for answer in answers] == [{2: 3}, {0: 3}, {1: 3}]


def test_recalls_of_a_round_stay_within_the_budget_of_its_steps():
    job = Job(2, policy=DGFM, block_size=8, move_budget=4)
    answers = job.round(report(capacity=99, free=99, promised=99), lends({0: 50}))
    assert answers[0].recall == {1: RECALL_STEPS * 4 // 8}
    job = Job(2, policy=DGFM, move_budget=0)
    assert job.round(report(promised=9), lends({0: 5}))[0].recall == {}


def test_creditors_that_are_short_get_their_rblocks_back_first():
    job = Job(3, policy=DGFM)
    rows = report(promised=2), lends({0: 2}), lends({0: 2}, wanted=1, wanted_for=4)
    answers = job.round(*rows)
    assert answers[0].lend == {2: 1}
    assert answers[0].recall == {2: 2}, "one into its room, one around the circle this closes"


# -- starvation ---------------------------------------------------------------------------------


def starving(wanted: int, wanted_for: int = 0, **fields: object) -> Report:
    return report(wanted=wanted, wanted_for=wanted_for, starved=True, free=0, **fields)


def test_a_starved_request_makes_the_youngest_elsewhere_give_way_and_bars_admission():
    job = Job(3)
    for _ in range(PATIENCE):
        job.round(report(), report(), report())
    younger = [report(youngest=3, youngest_blocks=5), report(youngest=8, youngest_blocks=2)]
    answers = job.round(starving(3), *younger)
    assert [answer.admit_before for answer in answers] == [0, 0, 0]
    assert [answer.give_way for answer in answers] == [0, 1, 2], "the youngest first"
    assert all(answer.give_way_at == -1 for answer in answers)


def test_those_with_rblocks_at_the_starved_ones_home_give_way_first():
    job = Job(3)
    job.round(report(), report(), report())
    younger = [report(youngest=3, youngest_blocks=5), report(youngest=8, youngest_blocks=9)]
    answers = job.round(starving(3, changes=Changes(lent={1: 4})), *younger)
    assert [answer.give_way for answer in answers] == [0, 3, 0]
    assert answers[1].give_way_at == 0


def test_older_requests_never_give_way():
    job = Job(3)
    answers = job.round(starving(3, wanted_for=5), report(youngest=4, youngest_blocks=9), report())
    assert [answer.give_way for answer in answers] == [0, 0, 0]
    assert [answer.admit_before for answer in answers] == [5, 5, 5]


def test_the_oldest_of_two_starved_requests_counts():
    job = Job(3)
    answers = job.round(
        starving(3, wanted_for=5), starving(2, wanted_for=4), report(youngest=9, youngest_blocks=9)
    )
    assert answers[0].admit_before == 4
    assert answers[2].give_way == 2


def test_what_was_granted_needs_no_victims():
    job = Job(3)
    answers = job.round(starving(5), report(promised=3), report(youngest=9, youngest_blocks=9))
    assert answers[0].granted == 3
    assert answers[2].give_way == 2


def test_victims_get_time_before_others_are_called():
    job = Job(2)
    rows = starving(3), report(youngest=3, youngest_blocks=1)
    called = [job.round(*rows)[1].give_way for _ in range(2 * PATIENCE)]
    assert called == [1, *[0] * (PATIENCE - 1)] * 2


def test_nothing_is_shed_while_somebody_starves():
    job = Job(3, requests(1), Policy(dgfm=False))
    answers = job.round(*uneven(promised=10), starving(5))
    assert answers[0].shed == {}
    assert answers[1].lend == {2: 5}


@pytest.mark.parametrize("policy", ["migrate", "queue", "isolated"])
def test_nobody_gives_way_to_another_instance_without_lending(policy):
    job = Job(2, policy=POLICIES[policy])
    answers = job.round(starving(3), report(youngest=9, youngest_blocks=9))
    assert [answer.admit_before for answer in answers] == [NOBODY, NOBODY]
    assert answers[1].give_way == 0


# -- messages -----------------------------------------------------------------------------------


def test_a_stale_report_is_refused_and_changes_nothing():
    job = Job(2, requests(2))
    bad = [encode_report(report(0)), encode_report(report(3))]
    with pytest.raises(ReportError, match="instance 1 says round 3"):
        job.manager.round(bad)
    answers = job.round(report(), report())
    assert [[row.id for row in answer.assign] for answer in answers] == [[0], [1]]


def test_most_answers_are_a_few_bytes():
    manager = Job(100, requests(1)).manager
    answers, _ = manager.round([encode_report(report())] * 100)
    assert sum(len(answer) > 20 for answer in answers) == 1


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_token_ids_survive_the_wire(tokens):
    assert unpack_tokens(pack_tokens(tokens)) == tokens
