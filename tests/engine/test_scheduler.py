"""What the scheduler does when memory is short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_distkv.control.messages import NOBODY, Answer, Request, Sampling, pack_tokens
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.engine.config import EngineConfig, OptionError
from hpc_distkv.engine.scheduler import GUEST_CHUNK, PATIENCE, Scheduler
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4


def make(num_blocks: int = 100, policy: str = "queue", **limits: int) -> Scheduler:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 16} | limits
    config = EngineConfig(num_blocks, BLOCK, policy=POLICIES[policy], **sizes)
    scheduler = Scheduler(RManager(0, num_blocks), config)
    scheduler.rm = scheduler._rm
    return scheduler


def add(scheduler: Scheduler, number: int, prompt: int, max_tokens: int = 8) -> Sequence:
    request = Request(number, pack_tokens(range(prompt)), Sampling(max_tokens=max_tokens))
    sequence = Sequence(request, assigned_at=0.0)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step as the worker does it, with token 0 sampled; request → tokens computed."""
    plan = scheduler.plan()
    scheduler.rm.check()
    scheduler.rm.commit(plan.moves, plan.recalls)
    for sequence, tokens in plan.rows:
        sequence.computed += tokens
        if not sequence.remaining:
            sequence.append(0, 0.0)
            if sequence.finish_reason:
                scheduler.finish(sequence)
    scheduler.rm.check()
    return {sequence.id: tokens for sequence, tokens in plan.rows}


def answer(scheduler: Scheduler, asked: int = 0, **fields: object) -> None:
    scheduler.apply(Answer(round=0, **fields), asked)


def running(scheduler: Scheduler) -> list[int]:
    return [sequence.id for sequence in scheduler.running]


# -- batches ------------------------------------------------------------------------------------


def test_decodes_go_first_and_prefills_fill_the_budget():
    scheduler = make()
    add(scheduler, 0, prompt=3)
    assert step(scheduler) == {0: 3}
    add(scheduler, 1, prompt=40)
    add(scheduler, 2, prompt=5)
    assert step(scheduler) == {0: 1, 1: 15}
    assert step(scheduler) == {0: 1, 1: 15}
    assert step(scheduler) == {0: 1, 1: 10, 2: 5}
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}


def test_rows_beyond_the_seats_wait():
    scheduler = make(max_num_seqs=2)
    for number in range(3):
        add(scheduler, number, prompt=2, max_tokens=2)
    assert step(scheduler) == {0: 2, 1: 2}
    assert step(scheduler) == {0: 1, 1: 1}
    assert step(scheduler) == {2: 2}


def host(scheduler: Scheduler, blocks: int) -> None:
    """Let the rBlocks of another instance's request arrive."""
    scheduler.rm.promise(blocks)
    scheduler.rm.settle({1: blocks})
    scheduler.rm.open_credit(1)
    scheduler.rm.commit([], scheduler.rm.host(1, [(99, index) for index in range(blocks)]))


def test_prompts_come_in_smaller_chunks_while_guests_wait_to_be_served():
    scheduler = make(policy="lend", max_num_batched_tokens=1000, num_blocks=1000)
    add(scheduler, 0, prompt=700)
    assert step(scheduler) == {0: 700}
    host(scheduler, 1)
    add(scheduler, 1, prompt=700)
    assert step(scheduler) == {0: 1, 1: GUEST_CHUNK}


# -- rows that give way -------------------------------------------------------------------------


def test_the_youngest_gives_way_and_is_computed_again():
    scheduler = make(num_blocks=5)
    add(scheduler, 0, prompt=7, max_tokens=9)
    add(scheduler, 1, prompt=7, max_tokens=9)
    computed = {0: 0, 1: 0}
    for _ in range(60):
        for request, tokens in step(scheduler).items():
            computed[request] += tokens
    assert scheduler.preemptions == 1
    assert not scheduler.running
    assert not scheduler.waiting
    assert computed[0] == 15
    assert computed[1] > 15


def test_a_row_waits_until_all_running_prompts_have_room():
    scheduler = make(num_blocks=10)
    add(scheduler, 0, prompt=30)
    add(scheduler, 1, prompt=20)
    step(scheduler)
    assert running(scheduler) == [0]


def three_rows(scheduler: Scheduler) -> None:
    """Three rows of two rBlocks each."""
    for number in (3, 5, 8):
        add(scheduler, number, prompt=5, max_tokens=12)
    step(scheduler)
    assert running(scheduler) == [3, 5, 8]


def test_a_victim_of_another_instances_row_keeps_its_age_when_it_comes_back():
    scheduler = make(num_blocks=8)
    three_rows(scheduler)
    answer(scheduler, give_way=5, admit_before=2)
    assert running(scheduler) == []
    answer(scheduler)
    step(scheduler)
    assert running(scheduler) == [3, 5, 8]


@pytest.mark.parametrize(
    ("blocks", "admit_before", "left"),
    [
        (1, 2, [3, 5]),
        (2, 2, [3, 5]),
        (3, 2, [3]),
        (99, 3, [3]),
        (99, 5, [3, 5]),
        (99, 8, [3, 5, 8]),
    ],
)
def test_the_youngest_give_way_until_enough_is_free_but_never_an_older_one(
    blocks, admit_before, left
):
    scheduler = make(num_blocks=8)
    three_rows(scheduler)
    answer(scheduler, give_way=blocks, admit_before=admit_before)
    assert running(scheduler) == left


def test_rblocks_at_one_instance_are_freed_only_by_those_that_have_some_there():
    scheduler = make(num_blocks=20, policy="lend")
    three_rows(scheduler)
    scheduler.rm.credit_opened(7, 2)
    scheduler.rm.commit([scheduler.rm.move_out(3, 0, 7), scheduler.rm.move_out(5, 0, 7)], [])
    answer(scheduler, give_way=1, give_way_at=7, admit_before=2)
    assert running(scheduler) == [3, 8]
    assert scheduler.rm.settle_debt(7) == ([5], 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from(["queue", "lend", "lend-greedy"]),
)
def test_every_row_that_fits_alone_is_finished_and_the_oldest_never_goes_back(
    num_blocks, rows, policy
):
    """Nobody lends: every round denies what was asked for."""
    scheduler = make(num_blocks, policy)
    fitting = [(p, o) for p, o in rows if p + o - 1 <= num_blocks * BLOCK]
    sequences = [add(scheduler, number, *row) for number, row in enumerate(fitting)]
    progress: dict[int, int] = {}
    for round_number in range(2000):
        if not scheduler.running and not scheduler.waiting:
            break
        if round_number % 3 == 0:
            answer(scheduler, asked=scheduler.demand().wanted)
        oldest = min(s.id for s in (*scheduler.running, *scheduler.waiting))
        step(scheduler)
        assert sequences[oldest].computed >= progress.get(oldest, 0)
        progress[oldest] = sequences[oldest].computed
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    assert scheduler.rm.usable == num_blocks


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
    """Two rows that have 6 and 5 of 13 rBlocks, and are about to need more."""
    scheduler = make(num_blocks=13, policy=policy, max_num_batched_tokens=64)
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
    scheduler.exchange_tokens = 0.5
    assert scheduler.demand().wanted > 0
    scheduler.exchange_tokens = 2.0
    assert scheduler.demand().wanted == 0


@pytest.mark.parametrize("policy", ["lend", "lend-greedy"])
def test_a_row_waits_for_no_loan_that_does_not_pay(policy):
    scheduler = two_that_fill(policy)
    scheduler.exchange_tokens = 100.0
    goes_on = [0 in step(scheduler) for _ in range(8)]
    assert all(goes_on) == (policy == "lend")
    assert (scheduler.preemptions == 1) == (policy == "lend")


def test_a_row_that_waits_and_fits_here_does_not_borrow_to_be_admitted():
    scheduler = make(num_blocks=12, policy="lend", max_num_batched_tokens=64)
    add(scheduler, 0, prompt=36, max_tokens=2)
    step(scheduler)
    add(scheduler, 1, prompt=20)
    assert scheduler.demand().wanted == 0


# -- with a planner, a row too large for its instance begins with all it needs --------------------


def large_and_small() -> Scheduler:
    """A row of 15 rBlocks and one of 2 wait for the same 12."""
    scheduler = make(num_blocks=12, policy="lend", max_num_batched_tokens=64)
    add(scheduler, 0, prompt=59, max_tokens=2)
    add(scheduler, 1, prompt=7, max_tokens=2)
    return scheduler


def test_a_row_too_large_waits_for_all_it_needs_and_others_pass_it():
    scheduler = large_and_small()
    assert step(scheduler) == {1: 7}
    demand = scheduler.demand()
    assert (demand.wanted_for, demand.whole, demand.largest) == (0, True, 15)
    assert not demand.starved
    assert step(scheduler) == {1: 1}
    scheduler.rm.credit_opened(3, 2)
    assert step(scheduler) == {}
    scheduler.rm.credit_opened(3, 1)
    assert 0 in step(scheduler)


def test_the_credit_of_a_row_too_large_is_not_for_those_that_pass_it():
    scheduler = large_and_small()
    add(scheduler, 2, prompt=36)
    scheduler.rm.credit_opened(3, 2)
    assert step(scheduler) == {1: 7}


def test_a_row_too_large_that_nobody_makes_room_for_is_starved_when_nothing_runs_here():
    scheduler = make(num_blocks=12, policy="lend")
    add(scheduler, 0, prompt=59)
    starved = []
    for _ in range(PATIENCE + 2):
        demand = scheduler.demand()
        starved.append(demand.starved)
        assert (demand.wanted_for, demand.whole) == (0, True)
        answer(scheduler, asked=demand.wanted)
        assert step(scheduler) == {}
    assert starved == [False] * PATIENCE + [True] * 2


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
    assert scheduler.demand().lendable == empty - 4, "16 tokens come to have KV"


def test_an_instance_whose_pool_is_full_of_guests_takes_no_rows():
    scheduler = make(num_blocks=8, policy="lend")
    scheduler.rm.promise(8)
    scheduler.rm.settle({1: 8})
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
    scheduler.rm.credit_opened(3, 8)
    plan = scheduler.plan()
    assert {(m.request, m.peer) for m in plan.moves} == {(0, 3)}
    assert [m.block for m in plan.moves] == list(range(len(plan.moves)))
    assert len(plan.moves) == 4, "all that is sealed may go"


def test_credit_that_is_not_needed_is_returned():
    scheduler = make(num_blocks=50, policy="lend")
    scheduler.rm.credit_opened(3, 8)
    assert scheduler.demand().wanted == 0
    assert scheduler.rm.settle_debt(3) == ([], 8)


@pytest.mark.xfail(strict=True, reason="free room at home counts as credit for it")
def test_credit_for_what_the_planner_moves_is_kept():
    scheduler = make(num_blocks=50, policy="lend")
    add(scheduler, 0, prompt=16)
    step(scheduler)
    scheduler.rm.credit_opened(3, 8)
    answer(scheduler, shed={3: 2})
    scheduler.demand()
    assert scheduler.rm.settle_debt(3) == ([], 6)


def test_the_longest_row_counts_by_what_is_sealed_at_home():
    scheduler = make(num_blocks=50, policy="lend")
    assert scheduler.longest == 0
    add(scheduler, 0, prompt=11)
    step(scheduler)
    assert scheduler.longest == 2
    scheduler.rm.credit_opened(3, 1)
    scheduler.rm.commit([scheduler.rm.move_out(0, 0, 3)], [])
    assert scheduler.longest == 1


def test_without_admission_bars_everybody_may_come():
    scheduler = make(num_blocks=50)
    answer(scheduler, admit_before=0)
    add(scheduler, 4, prompt=4)
    assert step(scheduler) == {}
    answer(scheduler, admit_before=NOBODY)
    assert step(scheduler) == {4: 4}


@pytest.mark.parametrize(
    "sizes", [{"num_blocks": 0}, {"num_blocks": 4, "max_num_batched_tokens": 0}]
)
def test_sizes_that_cannot_work_are_refused(sizes):
    with pytest.raises(OptionError):
        EngineConfig(**sizes)
