"""Which rows run in a step, and which are preempted when memory is short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import BLOCK, add, answer, expect_short, make, running, step

from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.demand import large_rows
from hpc_distkv.decide.pace import Calibration
from hpc_distkv.decide.scheduler import GUEST_STEPS, Scheduler
from hpc_distkv.errors import OptionError

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
    scheduler.rm.lender.promise(blocks)
    scheduler.rm.lender.settle({1: blocks})
    scheduler.rm.lender.open_credit(1)
    scheduler.rm.lender.commit(
        [], scheduler.rm.lender.host(1, [(99, index) for index in range(blocks)])
    )


def test_prompts_come_in_smaller_chunks_while_guests_wait_to_be_served():
    scheduler = make(policy="lend", max_num_batched_tokens=1000, num_blocks=1000)
    add(scheduler, 0, prompt=700)
    assert step(scheduler) == {0: 700}
    host(scheduler, 1)
    add(scheduler, 1, prompt=700)
    scheduler.calibrate(Calibration(step_tokens=10.0))
    assert step(scheduler) == {0: 1, 1: 10 * GUEST_STEPS}


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


# -- preempted rows -----------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_computed_again():
    scheduler = make(num_blocks=6)
    expect_short(scheduler)
    add(scheduler, 0, prompt=7, max_tokens=9)
    add(scheduler, 1, prompt=7, max_tokens=9)
    computed = {0: 0, 1: 0}
    for _ in range(60):
        for request, tokens in step(scheduler).items():
            computed[request] += tokens
    assert scheduler.counters.preemptions == 1
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
    """Three rows of two rBlocks each, that are about to need more."""
    expect_short(scheduler)
    for number in (3, 5, 8):
        add(scheduler, number, prompt=5, max_tokens=12)
    step(scheduler)
    assert running(scheduler) == [3, 5, 8]


def test_a_victim_of_another_instances_row_keeps_its_age_when_it_comes_back():
    scheduler = make(num_blocks=8)
    three_rows(scheduler)
    answer(scheduler, preempt=5, admit_before=2)
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
def test_the_youngest_are_preempted_until_enough_is_free_but_never_an_older_one(
    blocks, admit_before, left
):
    scheduler = make(num_blocks=8)
    three_rows(scheduler)
    answer(scheduler, preempt=blocks, admit_before=admit_before)
    assert running(scheduler) == left


def test_rblocks_at_one_instance_are_freed_only_by_those_that_have_some_there():
    scheduler = make(num_blocks=20, policy="lend")
    three_rows(scheduler)
    scheduler.rm.borrower.credit_opened(7, 2)
    borrower = scheduler.rm.borrower
    borrower.commit([borrower.move_out(3, 0, 7), borrower.move_out(5, 0, 7)], [])
    answer(scheduler, preempt=1, preempt_at=7, admit_before=2)
    assert running(scheduler) == [3, 8]
    assert scheduler.rm.borrower.settle(7)[:2] == ([5], 0)


@settings(deadline=None)
@given(
    st.integers(2, 12),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from(["queue", "lend", "lend-greedy"]),
    st.booleans(),
)
def test_every_row_that_fits_alone_is_finished_and_the_oldest_never_goes_back(
    num_blocks, rows, policy, short
):
    """Nobody lends: every round denies what was asked for, and lets what is too large begin."""
    scheduler = make(num_blocks, policy)
    if short:
        expect_short(scheduler)
    fitting = [(p, o) for p, o in rows if p + o - 1 <= num_blocks * BLOCK]
    sequences = [add(scheduler, number, *row) for number, row in enumerate(fitting)]
    progress: dict[int, int] = {}
    for round_number in range(2000):
        if not scheduler.running and not scheduler.waiting:
            break
        if round_number % 3 == 0:
            begin = [row.request for row in large_rows(scheduler)]
            answer(scheduler, asked=scheduler.demand().wanted, begin=begin)
        oldest = min(s.id for s in (*scheduler.running, *scheduler.waiting))
        step(scheduler)
        assert sequences[oldest].computed >= progress.get(oldest, 0)
        progress[oldest] = sequences[oldest].computed
    assert all(sequence.finish_reason() == "length" for sequence in sequences)
    assert scheduler.rm.slots.usable == num_blocks
