"""What an instance says and does between its messages."""

from __future__ import annotations

import pytest

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.loans import Header
from hpc_distkv.control.messages.percentiles import gap_bin
from hpc_distkv.control.messages.reports import Answer, Changes, Report
from hpc_distkv.control.messages.requests import (
    Request,
    Sampling,
    Unfinished,
    pack_tokens,
    unpack_tokens,
)
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.migration import handover
from hpc_distkv.decide.plan import Plan
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.loan import Move, ProtocolError

BLOCK = 4


def make(number: int = 0, num_blocks: int = 40, policy: str = "lend-greedy", **sizes) -> Instance:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64} | sizes
    return Instance(number, EngineConfig(num_blocks, BLOCK, policy=POLICIES[policy], **limits))


def request(number: int, prompt: int, max_tokens: int = 8, stop: tuple[int, ...] = ()) -> Request:
    sampling = Sampling(max_tokens=max_tokens, stop_token_ids=stop)
    return Request(number, pack_tokens(range(prompt)), sampling)


def boundary(instance: Instance, now: float = 0.0, **answer: object) -> Report:
    """A report and the answer to it."""
    report = instance.report()
    instance.apply(Answer(round=instance.round, **answer), now)
    return report


def step(instance: Instance, now: float = 0.0, token: int = 5) -> dict[int, Header]:
    """One step in which every row that may gets `token`; the headers to creditors."""
    plan = instance.plan()
    headers = instance.headers(plan, now)
    instance.commit(plan)
    ends = [row for row in plan.scheduled if row.sequence.remaining == row.tokens]
    instance.append(plan.scheduled, [token] * len(ends), now)
    instance.check()
    return headers


def give_credit(creditor: Instance, debtor: Instance, blocks: int) -> None:
    boundary(creditor, lend={debtor.rm.instance: blocks})
    assert creditor.credits() == {debtor.rm.instance: blocks}
    debtor.open_credit(creditor.rm.instance, blocks)


def serve(creditor: Instance, debtor: int, header: Header, now: float = 0.0) -> list[list[Move]]:
    moves = creditor.accept(debtor, header, now)
    creditor.commit_served(debtor, *moves)
    creditor.check()
    return moves


# -- answers and reports ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2])
def test_the_answer_of_another_round_is_refused(number):
    instance = make(3)
    boundary(instance)
    instance.report()
    words = f"instance 3 got the answer of round {number} in round 1"
    with pytest.raises(ProtocolError, match=words):
        instance.apply(Answer(round=number), 0.0)


def test_grants_beyond_the_promise_are_refused_and_counted():
    instance = make(num_blocks=40)
    promised = instance.report().promised
    assert promised > 2
    instance.apply(Answer(round=0, lend={1: 2, 2: promised - 1, 0: 1}), 0.0)
    assert instance.counters.refused_grants == 2
    assert {*instance.rm.lender.loans} == {1}
    instance.check()


def test_nothing_is_promised_or_wanted_without_sharing():
    instance = make(policy="queue", num_blocks=4)
    assert boundary(instance).promised == 0
    boundary(instance, assign=[request(0, 16), request(1, 16)])
    step(instance)
    report = boundary(instance)
    assert (report.promised, report.wanted, report.longest) == (0, 0, 0)


def test_loans_are_reported_when_they_change():
    instance = make()

    assert boundary(instance, lend={1: 2}).changes.lent is None
    assert boundary(instance).changes.lent == {1: 2}
    assert boundary(instance).changes.lent is None
    assert instance.credits() == {1: 2}
    assert boundary(instance).changes.lent is None, "set aside is set aside"
    serve(instance, 1, Header([], [], [], 1, [], [], [], []))
    assert boundary(instance).changes.lent == {1: 1}
    serve(instance, 1, Header([], [], [], 1, [], [], [], []))
    assert boundary(instance).changes.lent == {}


def test_loans_are_reported_after_a_grant_though_they_are_as_before():
    """The ledger counts the new rBlock, but as many were returned meanwhile."""
    instance = make()
    boundary(instance, lend={1: 2})
    instance.credits()
    assert boundary(instance, lend={1: 1}).changes.lent == {1: 2}
    serve(instance, 1, Header([], [], [], 1, [], [], [], []))
    assert boundary(instance).changes.lent == {1: 2}


def test_a_report_says_what_runs_and_what_is_free():
    instance = make(num_blocks=40, max_num_seqs=3)
    boundary(instance, assign=[request(3, 9), request(7, 12)])
    step(instance)
    report = boundary(instance)
    assert report.capacity == 40
    assert report.free == 40 - 3 - 3
    assert (report.running, report.seats) == (2, 1)
    assert (report.youngest, report.youngest_blocks) == (7, 3)
    assert report.kv_tokens == 9 + 12
    # 8 tokens of output each; the first of them is made already.
    assert report.request_blocks == pytest.approx((17 + 20) / 2 / BLOCK)
    assert report.work_left == pytest.approx((17 - 9) + (20 - 12))


def test_an_idle_instance_has_nothing_and_room_for_all():
    report = make(max_num_seqs=8, max_num_batched_tokens=64).report()
    assert (report.running, report.waiting, report.lacking) == (0, 0, 0)
    assert (report.youngest, report.youngest_blocks, report.longest) == (-1, 0, 0)
    assert (report.work_left, report.request_blocks) == (0, 0)
    assert (report.seats, report.room_requests, report.room_tokens) == (8, 8, 2 * 64)
    assert (report.drain, report.halt) == (False, False)


def test_a_report_says_what_is_wanted_and_for_whom():
    """Row 3 comes to 60 tokens, 32 of which are foreseen now; row 7 to 42. One rBlock is in
    reserve."""
    instance = make(num_blocks=12)
    boundary(instance, assign=[request(3, 20, max_tokens=40), request(7, 12, max_tokens=30)])
    step(instance)
    report = boundary(instance)
    row_3, row_7 = -(-(21 + 32) // BLOCK), -(-42 // BLOCK)
    assert report.wanted == 1 + (row_3 - 5) + row_7 - (12 - 5)
    assert (report.wanted_for, report.largest) == (3, 60 // BLOCK)
    assert (report.running, report.waiting, report.longest) == (1, 1, 5)
    assert (report.seats, report.room_requests, report.room_tokens) == (7, 6, 2 * 64 - 12)


@pytest.mark.parametrize(("policy", "lacks"), [("lend", True), ("lend-greedy", False)])
def test_what_a_row_lacks_to_begin_is_for_planners(policy, lacks):
    """Row 1 needs 11 rBlocks in the end, and row 0 has 13 of the 20 then."""
    instance = make(num_blocks=20, policy=policy)
    boundary(instance, assign=[request(0, 20, max_tokens=40), request(1, 12, max_tokens=30)])
    step(instance)
    report = boundary(instance)
    assert (report.running, report.waiting) == (1, 1)
    assert bool(report.lacking) == lacks
    assert report.lacking <= 11


@pytest.mark.parametrize("want", ["drain", "halt"])
def test_what_the_rank_wants_of_the_run_is_passed_on(want):
    report = make().report(**{want: True})
    assert (report.drain, report.halt) == (want == "drain", want == "halt")


def test_what_remains_is_what_was_not_reported():
    instance = make()
    boundary(instance, assign=[request(n, 4, max_tokens=2 + n) for n in range(3)])
    step(instance)
    step(instance)
    boundary(instance)
    step(instance)
    instance.apply(Answer(round=2, assign=[request(9, 4)]), 0.0)
    remains = instance.remains()
    assert remains.counters.generated_tokens == 2 + 3 + 3
    assert [result.id for result in remains.results] == [1]
    assert remains.unfinished == [Unfinished(2, pack_tokens([5, 5, 5]))]


def test_kv_tokens_are_those_attended_to_here():
    one, other = borrowing()
    assert one.report().kv_tokens == 13 - 2 * BLOCK
    assert other.report().kv_tokens == 2 * BLOCK


def test_outputs_are_expected_to_be_as_large_a_part_of_their_limits_as_those_that_ended():
    instance = make()
    boundary(instance, assign=[request(0, 4, max_tokens=10, stop=(7,))])
    step(instance)
    step(instance, token=7)
    boundary(instance, assign=[request(1, 4, max_tokens=100)])
    assert instance.report().work_left == pytest.approx(4 + 20)


def test_counters_come_along_when_there_is_nothing_to_do():
    instance = make()
    assert isinstance(boundary(instance).changes.counters, Counters)
    boundary(instance, assign=[request(0, 4)])
    assert boundary(instance).changes == Changes(), "a row waits"
    step(instance)
    assert boundary(instance).changes == Changes(), "it runs"


def test_a_result_is_reported_once_with_its_times():
    instance = make()
    boundary(instance, now=10.0, assign=[request(0, 4, max_tokens=3)])
    for now in (11.0, 11.5, 13.0):
        step(instance, now)
    (result,) = boundary(instance).changes.results
    assert (result.id, unpack_tokens(result.tokens)) == (0, [5, 5, 5])
    assert (result.first_token_time, result.total_time) == (1.0, 3.0)
    assert instance.counters.gaps == {gap_bin(0.5): 1, gap_bin(1.5): 1}
    assert instance.counters.generated_tokens == 3
    assert instance.counters.prompt_tokens == 4
    assert instance.report().changes.results == []


# -- headers ------------------------------------------------------------------------------------


def borrowing() -> tuple[Instance, Instance]:
    """Instance 0 has a row of which 1 hosts two rBlocks."""
    one, other = make(0), make(1)
    boundary(one, assign=[request(0, 13, max_tokens=30)])
    step(one)
    give_credit(other, one, 5)
    moves = [one.rm.borrower.move_out(0, index, 1) for index in (0, 1)]
    headers = one.headers(Plan([], moves, [], []), 0.0)
    assert headers[1].moves == [(0, 0), (0, 1)]
    one.commit(Plan([], moves, [], []))
    serve(other, 0, headers[1])
    return one, other


def test_only_creditors_with_news_get_a_header():
    one, _ = borrowing()
    one.open_credit(2, 3)
    assert one.headers(Plan([], [], [], []), 0.0) == {}
    one.rm.borrower.return_credit(2, 3)
    headers = one.headers(Plan([], [], [], []), 0.0)
    assert headers == {2: Header([], [], [], 3, [], [], [], [])}


def test_rows_with_rblocks_elsewhere_send_their_queries_there():
    one, _ = borrowing()
    plan = one.plan()
    headers = one.headers(plan, 0.0)
    assert [query[:2] for query in headers[1].queries] == [([0], 1)]


def test_a_row_that_ends_is_released_and_its_credit_is_used_again():
    one, other = borrowing()
    (sequence,) = one.scheduler.running
    one.scheduler.finish(sequence)
    (header,) = one.headers(Plan([], [], [], []), 0.0).values()
    assert header.released == [0]
    serve(other, 0, header)
    assert not other.rm.lender.guests
    assert one.counters.blocks_returned == other.counters.blocks_returned == 0


def test_rblocks_come_home_by_the_same_header_on_both_sides():
    one, other = borrowing()
    home = [one.rm.borrower.bring_home(0, 1, 1)]
    (header,) = one.headers(Plan([], [], home, []), 0.0).values()
    assert header.recalls == [(0, 1)]
    one.commit(Plan([], [], home, []))
    outgoing, incoming = serve(other, 0, header)
    assert [(move.key, move.block) for move in outgoing] == [(0, 1)]
    assert incoming == []
    assert other.rm.lender.guests[0, 0].indices == [0]
    assert one.counters.blocks_returned == 1


# -- handing over -------------------------------------------------------------------------------


def migrating(**sizes: int) -> tuple[Instance, Instance, Plan, Header]:
    """Instance 0's row is about to go on at 1 at time 20."""
    one, other = make(0, policy="migrate"), make(1, policy="migrate", **sizes)
    boundary(one, now=10.0, assign=[request(0, 13, max_tokens=30)])
    step(one, now=12.0)
    step(one, now=13.0)
    give_credit(other, one, 10)
    plan = one.plan()
    assert [sequence.id for sequence in plan.leaving] == [0]
    (header,) = one.headers(plan, 20.0).values()
    return one, other, plan, header


def test_a_row_that_is_handed_over_keeps_its_tokens_and_its_ages():
    """The clocks of two nodes have nothing to do with each other."""
    one, other, plan, header = migrating()
    one.commit(plan)
    assert one.scheduler.running == []
    assert one.rm.slots.usable == 40
    assert one.counters.migrations == 1
    serve(other, 0, header, now=1000.0)
    (sequence,) = other.scheduler.running
    assert sequence.tokens == [*range(13), 5, 5]
    assert sequence.computed == 14
    assert sequence.assigned_at == pytest.approx(1000 - 10)
    assert sequence.first_token_at == pytest.approx(1000 - 8)
    assert sequence.last_token_at == pytest.approx(1000 - 7)
    assert other.report().changes.adopted == [0]
    step(other, now=1001.0)
    assert sequence.tokens == [*range(13), 5, 5, 5]
    assert other.counters.gaps == {gap_bin(8.0): 1}


def test_a_row_without_a_token_has_no_age_of_one():
    letter = handover(TokenSequence(request(0, 5), assigned_at=10.0), now=20.0)
    assert letter.assigned_age == 10.0
    assert (letter.first_token_age, letter.last_token_age) == (None, None)


def test_an_instance_with_a_row_too_many_reports_what_is_no_fault():
    one, other, plan, header = migrating(max_num_seqs=1)
    one.commit(plan)
    boundary(other, assign=[request(9, 4)])
    step(other)
    serve(other, 0, header)
    assert len(other.scheduler.running) == 2
    assert other.report().seats == 0


def test_a_row_may_come_back_while_the_step_that_handed_it_over_still_runs():
    """Its rBlocks have left, but the slower instance is not through its layers yet."""
    one, other, plan, header = migrating()
    serve(other, 0, header)
    give_credit(one, other, 10)
    back = other.plan()
    assert [sequence.id for sequence in back.leaving] == [0]
    serve(one, 1, other.headers(back, 0.0)[0])
    one.commit(plan)
    assert [sequence.id for sequence in one.scheduler.running] == [0]
