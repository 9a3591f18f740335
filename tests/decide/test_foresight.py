"""The KV that rows are expected to need, against counting step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import BLOCK, add, make, step

from hpc_distkv.decide.foresight import ExpectedKv, Foresight

lengths = st.integers(1, 30)
begun = st.builds(ExpectedKv, st.just(0), lengths, st.integers(0, 60))
"""Rows that run, or would from now on."""
later = st.builds(
    lambda start, length, tokens: ExpectedKv(start, start + length, tokens),
    st.integers(0, 40),
    lengths,
    st.integers(0, 60),
)


def foresight() -> Foresight:
    return make().foresight


def blocks_at(step_number: int, expected: list[ExpectedKv]) -> float:
    """rBlocks after so many steps, of those that do not end before: a row has all its tokens in its
    last step, and the last rBlock of each is half full in the mean."""
    return sum(
        (kv.tokens + step_number - kv.start) / BLOCK + 0.5
        for kv in expected
        if kv.start < step_number <= kv.end
    )


def most(expected: list[ExpectedKv], until: int = 100) -> float:
    return max((blocks_at(number, expected) for number in range(1, until + 1)), default=0.0)


def fits_beside(running: list[ExpectedKv], row: ExpectedKv, room: float) -> bool:
    """In every step in which others run: alone, a row may be as large as it is."""
    return all(
        blocks_at(number, [*running, row]) <= room
        for number in range(int(row.start) + 1, int(row.end) + 1)
        if blocks_at(number, running)
    )


@given(st.lists(later, max_size=8))
def test_the_peak_is_the_most_that_is_taken_in_any_step(expected):
    assert foresight().peak(expected) == most(expected)
    for kv in expected:
        assert foresight().peak(expected, kv.end) == most(expected, int(kv.end))


def test_nobody_takes_nothing():
    assert foresight().peak([]) == 0.0


@given(st.lists(begun, min_size=1, max_size=8), begun, st.integers(0, 60))
def test_a_row_has_its_place_at_the_first_end_of_another_from_which_it_fits(running, row, room):
    start = foresight().start(running, row, room)
    ends = sorted({kv.end for kv in running})
    assert start == next(end for end in ends if fits_beside(running, row.at(end), room))


def test_a_row_that_ends_before_another_has_grown_does_not_wait_for_it():
    """The long one will come to 25 rBlocks, but has 6 when the short one, of 10, is done."""
    long, ends_soon, short = ExpectedKv(0, 80, 18), ExpectedKv(0, 2, 40), ExpectedKv(0, 2, 36)
    assert foresight().start([long, ends_soon], short, room=17) == 2


def test_a_place_in_time_moves_the_whole_kv():
    assert ExpectedKv(0, 7, 20).at(30) == ExpectedKv(30, 37, 20)


# -- of sequences ---------------------------------------------------------------------------------


def test_a_row_is_expected_to_need_its_prompt_and_a_token_a_step_for_its_output():
    scheduler = make()
    sequence = add(scheduler, 0, prompt=10, max_tokens=6)
    assert scheduler.foresight.expected_kv(sequence) == ExpectedKv(0, 6, 10)
    step(scheduler)
    assert scheduler.foresight.expected_kv(sequence) == ExpectedKv(0, 5, 11)


@pytest.mark.parametrize(("made", "left"), [(1, 4), (4, 1), (5, 1), (7, 1)])
def test_a_row_that_outlives_what_was_expected_ends_with_its_next_token(made, left):
    """Outputs come to half of their limits: 5 tokens of 10."""
    scheduler = make()
    scheduler.foresight.outputs.add(1, 2)
    sequence = add(scheduler, 0, prompt=3, max_tokens=10)
    for _ in range(made):
        step(scheduler)
    assert scheduler.foresight.expected_kv(sequence) == ExpectedKv(0, left, 3 + made)


def test_rblocks_elsewhere_are_not_expected_at_home():
    scheduler = make(policy="lend")
    sequence = add(scheduler, 0, prompt=11)
    step(scheduler)
    scheduler.rm.borrower.credit_opened(3, 1)
    scheduler.rm.borrower.commit([scheduler.rm.borrower.move_out(0, 0, 3)], [])
    assert scheduler.foresight.expected_kv(sequence).tokens == 12 - BLOCK


def test_what_a_row_lacks_ends_with_the_last_token_that_needs_any():
    scheduler = make()
    sequence = add(scheduler, 0, prompt=10, max_tokens=3)
    assert scheduler.foresight.missing(sequence, 8) == 2
    assert scheduler.foresight.missing(sequence, 99) == 3, "12 tokens: the last output needs none"
    step(scheduler)
    assert scheduler.foresight.missing(sequence, 99) == 0
