"""What an instance asks of others and promises them, and what becomes of its credit."""

from __future__ import annotations

import pytest
from schedules import add, answer, expect_short, make, running, step

from hpc_distkv.control.messages.reports import Large
from hpc_distkv.decide.demand import lacking, large_rows, longest
from hpc_distkv.decide.pace import Calibration
from hpc_distkv.decide.scheduler import PATIENCE, Scheduler

# -- what is asked for --------------------------------------------------------------------------


def test_a_row_alone_is_admitted_beyond_the_pool_and_asks_for_what_it_lacks():
    scheduler = make(num_blocks=4, policy="lend-greedy")
    add(scheduler, 0, prompt=100)
    assert step(scheduler) == {0: 16}
    demand = scheduler.demand()
    assert demand.wanted >= 25 - 4
    assert demand.wanted_for == 0
    assert demand.lendable == 0


def test_it_is_starved_only_when_nobody_will_lend():
    scheduler = make(num_blocks=4, policy="lend-greedy")
    add(scheduler, 0, prompt=100)
    step(scheduler)
    assert step(scheduler) == {}
    assert not scheduler.demand().starved
    answer(scheduler, asked=21)
    assert step(scheduler) == {}
    assert scheduler.demand().starved


def test_it_is_starved_when_what_was_granted_does_not_come():
    scheduler = make(num_blocks=4, policy="lend-greedy")
    add(scheduler, 0, prompt=100)
    step(scheduler)
    for _ in range(PATIENCE):
        step(scheduler)
        assert not scheduler.demand().starved
        answer(scheduler, asked=21, granted=21)
    step(scheduler)
    assert scheduler.demand().starved


@pytest.mark.parametrize("policy", ["migrate", "queue", "isolated"])
def test_nobody_starves_another_instances_rows_without_lending(policy):
    scheduler = make(num_blocks=4, policy=policy)
    add(scheduler, 0, prompt=16, max_tokens=8)
    for _ in range(3):
        step(scheduler)
        answer(scheduler, asked=2)
    assert not scheduler.demand().starved


def test_more_steps_in_a_round_mean_more_growth_to_ask_for():
    def wanted(steps: int) -> int:
        scheduler = make(num_blocks=1, policy="lend-greedy", max_num_batched_tokens=4)
        add(scheduler, 0, prompt=3, max_tokens=1000)
        for _ in range(8):
            for _ in range(steps):
                scheduler.plan()
            answer(scheduler, granted=1)
        return scheduler.demand().wanted

    assert wanted(1) < wanted(20) < wanted(60)


# -- with a planner, loans must pay -------------------------------------------------------------


def two_that_fill(policy: str) -> Scheduler:
    """Two rows that have 6 and 5 of 14 rBlocks, and are about to need more."""
    scheduler = make(num_blocks=14, policy=policy, max_num_batched_tokens=64)
    expect_short(scheduler)
    add(scheduler, 0, prompt=23, max_tokens=20)
    add(scheduler, 1, prompt=20, max_tokens=20)
    step(scheduler)
    assert running(scheduler) == [0, 1]
    return scheduler


def test_without_a_planner_any_shortage_is_borrowed_against():
    assert two_that_fill("lend-greedy").demand().wanted > 0


def test_a_row_borrows_if_that_costs_less_than_to_compute_the_youngest_again():
    """18 steps with an exchange each, against 21 tokens computed again."""
    scheduler = two_that_fill("lend")
    scheduler.calibrate(Calibration(exchange_tokens=0.5))
    assert scheduler.demand().wanted > 0
    scheduler.calibrate(Calibration(exchange_tokens=2.0))
    assert scheduler.demand().wanted == 0


@pytest.mark.parametrize("policy", ["lend", "lend-greedy"])
def test_a_row_waits_for_no_loan_that_does_not_pay(policy):
    scheduler = two_that_fill(policy)
    scheduler.calibrate(Calibration(step_tokens=100.0, exchange_tokens=100.0))
    goes_on = [0 in step(scheduler) for _ in range(8)]
    assert all(goes_on) == (policy == "lend")
    assert (scheduler.counters.preemptions == 1) == (policy == "lend")


def test_a_row_that_waits_and_fits_here_does_not_borrow_to_be_admitted():
    scheduler = make(num_blocks=12, policy="lend", max_num_batched_tokens=64)
    add(scheduler, 0, prompt=36, max_tokens=2)
    step(scheduler)
    add(scheduler, 1, prompt=20)
    assert scheduler.demand().wanted == 0


def a_fragment(second: int) -> Scheduler:
    """A row that comes to have 11 of 20 rBlocks, and one that waits with a prompt of `second`
    tokens and 8 of output; 2 rBlocks are for new rows to begin with."""
    scheduler = make(num_blocks=20, policy="lend")
    add(scheduler, 0, prompt=36, max_tokens=8)
    for _ in range(3):
        step(scheduler)
    add(scheduler, 1, prompt=second)
    return scheduler


def test_room_that_a_waiting_row_cannot_use_yet_is_lendable():
    """Row 1 comes to have 11.25 rBlocks beside the 11.25 of row 0, and one is in reserve."""
    scheduler = a_fragment(second=36)
    demand = scheduler.demand()
    assert (demand.wanted, demand.lendable) == (0, 20 - 2 - 11 - 1)
    assert lacking(scheduler) == 4


def test_room_that_a_waiting_row_begins_with_is_not_lendable():
    scheduler = a_fragment(second=20)
    assert scheduler.demand().lendable == 0
    assert lacking(scheduler) == 0


def test_two_rows_do_not_begin_in_the_same_room():
    """When row 0 ends it has 11.5 rBlocks and row 1 has 5.25, and row 2 would have as many: 22 of
    20, with one in reserve."""
    scheduler = a_fragment(second=12)
    assert lacking(scheduler) == 0
    add(scheduler, 2, prompt=12)
    assert lacking(scheduler) == 0
    scheduler.demand()
    assert lacking(scheduler) == 3


# -- with a planner, a row too large for its instance begins on the gManager's word ---------------


def large_and_small() -> Scheduler:
    """A row of 15 rBlocks and one of 2 wait for the same 12."""
    scheduler = make(num_blocks=12, policy="lend", max_num_batched_tokens=16)
    add(scheduler, 0, prompt=59, max_tokens=2)
    add(scheduler, 1, prompt=7, max_tokens=2)
    return scheduler


def test_a_row_too_large_waits_for_the_gmanager_and_others_pass_it():
    scheduler = large_and_small()
    assert large_rows(scheduler) == [Large(0, False, 0, 15, 59.0, 2.0)]
    assert step(scheduler) == {1: 7}
    assert scheduler.demand().wanted == 0
    assert scheduler.fresh == 1, "it may go elsewhere"
    answer(scheduler, begin=[0])
    assert scheduler.fresh == 0
    assert large_rows(scheduler)[0].begun
    assert step(scheduler) == {0: 15, 1: 1}
    assert large_rows(scheduler) == [Large(0, True, 4, 15, 44.0, 2.0)]


def test_a_row_too_large_asks_for_all_its_prompt_as_soon_as_it_runs():
    scheduler = large_and_small()
    answer(scheduler, begin=[0])
    step(scheduler)
    demand = scheduler.demand()
    assert (demand.wanted_for, demand.largest) == (0, 15)
    assert demand.wanted >= 15 - 12


def test_a_row_too_large_that_was_preempted_waits_for_the_gmanager_again():
    scheduler = large_and_small()
    answer(scheduler, begin=[0])
    step(scheduler)
    answer(scheduler, preempt=1, admit_before=-1)
    assert running(scheduler) == []
    answer(scheduler)
    assert 0 not in step(scheduler)
    assert not large_rows(scheduler)[0].begun


@pytest.mark.parametrize(("begin", "given"), [([], [0, 1]), ([0], [1])])
def test_a_row_too_large_goes_elsewhere_only_as_long_as_it_may_not_begin(begin, given):
    scheduler = large_and_small()
    answer(scheduler, begin=begin)
    assert [sequence.id for sequence in scheduler.give_back(5)] == given


def test_word_of_a_row_that_does_not_wait_any_more_is_forgotten():
    scheduler = large_and_small()
    step(scheduler)
    answer(scheduler, begin=[1, 7])
    scheduler.running[0].computed = 0
    add(scheduler, 7, prompt=59)
    assert not any(row.begun for row in large_rows(scheduler))


def test_a_step_ahead_that_has_memory_ends_a_shortage():
    scheduler = make(num_blocks=12, policy="lend")
    add(scheduler, 0, prompt=3)
    scheduler.short = True
    scheduler.plan()
    assert scheduler._short_steps == 1
    scheduler.plan(ahead=True)
    assert scheduler._short_steps == 0


def test_a_row_too_large_leaves_others_what_they_grow_by_while_they_go_on():
    """Row 1 grows to 3 rBlocks more than it has, and one is in reserve."""
    scheduler = make(num_blocks=12, policy="lend", max_num_batched_tokens=64)
    add(scheduler, 1, prompt=3, max_tokens=14)
    step(scheduler)
    add(scheduler, 2, prompt=59)
    answer(scheduler, begin=[2])
    assert step(scheduler) == {1: 1, 2: 4 * (12 - 1 - 3 - 1)}
    while 1 in running(scheduler):
        assert step(scheduler).keys() == {1}
    assert step(scheduler)[2] > 0
    assert scheduler.counters.preemptions == 0


@pytest.mark.parametrize(("step_tokens", "waited"), [(14.0, 2), (40.0, 0)])
def test_a_row_is_preempted_only_after_the_time_that_it_would_take_again(step_tokens, waited):
    """Row 0 lacks an rBlock when row 2 has 31 tokens."""
    scheduler = make(num_blocks=12, policy="lend", max_num_batched_tokens=64)
    expect_short(scheduler)
    for number, prompt in enumerate((5, 3, 27)):
        add(scheduler, number, prompt, max_tokens=40)
    scheduler.calibrate(Calibration(step_tokens, exchange_tokens=100.0))
    ran = []
    while not scheduler.counters.preemptions:
        ran.append(0 in step(scheduler))
    assert ran.count(False) == waited
    assert running(scheduler) == [0, 1]


# -- what is lent -------------------------------------------------------------------------------


def test_nobody_younger_than_a_starved_request_is_admitted_and_its_room_is_lendable():
    scheduler = make(num_blocks=10, policy="lend")
    answer(scheduler, admit_before=3)
    add(scheduler, 5, prompt=8)
    assert step(scheduler) == {}
    assert scheduler.demand().lendable == 10
    add(scheduler, 2, prompt=8)
    assert step(scheduler) == {2: 8}


def test_room_for_a_first_chunk_is_not_lent_unless_somebody_starves():
    scheduler = make(num_blocks=40, policy="lend")
    assert 0 < scheduler.demand().lendable < 40
    answer(scheduler, admit_before=0)
    assert scheduler.demand().lendable == 40


def test_room_that_rows_here_will_need_is_not_lent():
    scheduler = make(num_blocks=40, policy="lend")
    empty = scheduler.demand().lendable
    add(scheduler, 0, prompt=9, max_tokens=8)
    assert scheduler.demand().lendable == empty - 5, "17 tokens, and half an rBlock"


def test_what_one_row_gives_back_before_another_needs_it_is_needed_once():
    """Row 1 ends when it has 50 tokens and row 0 has 19: in 18.25 rBlocks. Row 0 alone comes to 17:
    together, but not at once, they need 30."""
    scheduler = make(num_blocks=40, policy="lend", max_num_batched_tokens=64)
    empty = scheduler.demand().lendable
    add(scheduler, 0, prompt=9, max_tokens=57)
    add(scheduler, 1, prompt=40, max_tokens=10)
    assert scheduler.demand().lendable == empty - 19


def test_an_instance_whose_pool_is_full_of_guests_takes_no_rows():
    scheduler = make(num_blocks=8, policy="lend")
    scheduler.rm.lender.promise(8)
    scheduler.rm.lender.settle({1: 8})
    assert scheduler.room() == (0, 0)


def test_what_is_kept_for_a_loan_is_neither_assigned_nor_admitted_into_but_lent():
    scheduler = make(num_blocks=20, policy="lend")
    add(scheduler, 0, prompt=4)
    step(scheduler)
    add(scheduler, 1, prompt=30)
    lendable = scheduler.demand().lendable
    answer(scheduler, keep=15)
    step(scheduler)
    assert running(scheduler) == [0]
    assert scheduler.room()[0] > 0
    assert scheduler.demand().lendable > lendable
    answer(scheduler, keep=18)
    assert scheduler.room() == (0, 0)
    answer(scheduler)
    step(scheduler)
    assert running(scheduler) == [0, 1]


# -- credit -------------------------------------------------------------------------------------


def test_credit_is_used_for_the_oldest_rblocks_of_the_longest_row():
    scheduler = make(num_blocks=6, policy="lend-greedy")
    add(scheduler, 0, prompt=40)
    step(scheduler)
    scheduler.rm.borrower.credit_opened(3, 8)
    plan = scheduler.plan()
    assert {(m.key, m.peer) for m in plan.moves} == {(0, 3)}
    assert [m.block for m in plan.moves] == list(range(len(plan.moves)))
    assert len(plan.moves) == 4, "all that is sealed may go"


def test_credit_that_is_not_needed_is_returned():
    scheduler = make(num_blocks=50, policy="lend")
    scheduler.rm.borrower.credit_opened(3, 8)
    assert scheduler.demand().wanted == 0
    assert scheduler.rm.borrower.settle(3)[:2] == ([], 8)


def test_credit_for_what_the_planner_moves_is_kept():
    scheduler = make(num_blocks=50, policy="lend")
    add(scheduler, 0, prompt=16)
    step(scheduler)
    scheduler.rm.borrower.credit_opened(3, 8)
    answer(scheduler, shed={3: 2})
    scheduler.demand()
    assert scheduler.rm.borrower.settle(3)[:2] == ([], 6)


def test_the_longest_row_counts_by_what_is_sealed_at_home():
    scheduler = make(num_blocks=50, policy="lend")
    assert longest(scheduler) == 0
    add(scheduler, 0, prompt=11)
    step(scheduler)
    assert longest(scheduler) == 2
    scheduler.rm.borrower.credit_opened(3, 1)
    scheduler.rm.borrower.commit([scheduler.rm.borrower.move_out(0, 0, 3)], [])
    assert longest(scheduler) == 1
