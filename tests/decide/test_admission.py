"""Which waiting row begins."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from schedules import BLOCK, add, answer, expect_short, make, running, step

from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.decide.admission import REFUSED_STEPS, Admission
from hpc_distkv.decide.demand import lacking
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.decide.state import CANDIDATES, State

ANY = 10**4
"""Prompt tokens in a step: every prompt is computed in one."""

row_sizes = st.tuples(st.integers(1, 30), st.integers(1, 40))
"""Tokens of prompt and of output."""


# -- younger ones pass ----------------------------------------------------------------------------


def one_runs_one_waits() -> tuple[Scheduler, TokenSequence]:
    """Rows 0 and 1 come to have 13 rBlocks each, and there are 20, one in reserve: row 1 has its
    place in 10 steps, when row 0 ends."""
    scheduler = make(num_blocks=20, max_num_batched_tokens=ANY)
    add(scheduler, 0, prompt=40, max_tokens=10)
    blocked = add(scheduler, 1, prompt=40, max_tokens=10)
    return scheduler, blocked


@pytest.mark.parametrize(("output", "passes"), [(5, True), (17, True), (18, False), (40, False)])
def test_a_younger_row_passes_if_the_blocked_one_has_its_place_nevertheless(output, passes):
    """17 steps from now row 2 has 25 tokens in 6.75 rBlocks, and row 1, which has run for 7 steps,
    47 in 12.25: that is all there is. All that row 2 has now would fit in any case."""
    scheduler, _ = one_runs_one_waits()
    add(scheduler, 2, prompt=8, max_tokens=output)
    step(scheduler)
    assert running(scheduler) == ([0, 2] if passes else [0])
    for _ in range(9):
        assert 1 not in running(scheduler)
        step(scheduler)
    step(scheduler)
    assert 1 in running(scheduler)


def test_a_row_waits_if_it_has_room_now_but_not_when_those_that_run_have_grown():
    scheduler = make(num_blocks=20, max_num_batched_tokens=ANY)
    add(scheduler, 0, prompt=4, max_tokens=60)
    add(scheduler, 1, prompt=4, max_tokens=60)
    step(scheduler)
    assert running(scheduler) == [0]


def test_a_row_that_may_come_to_fill_the_pool_keeps_no_short_one_waiting():
    """In 76 steps row 0 has all there is, the reserve included; the others are done in 3."""
    scheduler = make(num_blocks=20, max_num_batched_tokens=ANY)
    add(scheduler, 0, prompt=4, max_tokens=77)
    for number in range(1, 6):
        add(scheduler, number, prompt=4, max_tokens=3)
    add(scheduler, 6, prompt=4, max_tokens=70)
    step(scheduler)
    assert running(scheduler) == [0, 1, 2, 3, 4, 5]


def test_a_row_passes_no_other_that_could_begin():
    scheduler = make(num_blocks=20, max_num_seqs=2)
    for number in range(3):
        add(scheduler, number, prompt=4 * (3 - number))
    step(scheduler)
    assert running(scheduler) == [0, 1]


@settings(deadline=None)
@given(
    st.lists(row_sizes, min_size=1, max_size=5),
    st.tuples(st.integers(1, 50), st.integers(1, 20)),
    st.lists(row_sizes, min_size=1, max_size=8),
)
def test_a_blocked_row_begins_at_its_place_whatever_comes_after_it(first, blocked, stream):
    """rBlocks have two tokens: what is foreseen is then never less than what is taken."""
    scheduler = make(num_blocks=40, max_num_batched_tokens=ANY, block_size=2)
    for number, (prompt, output) in enumerate(first):
        add(scheduler, number, prompt, output)
    while scheduler.waiting:
        step(scheduler)
    foresight, row = scheduler.foresight, add(scheduler, len(first), *blocked)
    expected = [foresight.expected_kv(other) for other in scheduler.running]
    room = 40 - 1  # in reserve
    place = foresight.start(expected, foresight.expected_kv(row), room) if expected else 0
    event("blocked" if foresight.peak([*expected, foresight.expected_kv(row)]) > room else "begins")
    younger = zip(itertools.count(len(first) + 1), itertools.cycle(stream), strict=False)
    steps = 0
    while row in scheduler.waiting:
        assert steps <= place
        while len(scheduler.waiting) < CANDIDATES:
            number, (prompt, output) = next(younger)
            add(scheduler, number, prompt, output)
        step(scheduler)
        steps += 1


@settings(deadline=None)
@given(
    st.lists(row_sizes, min_size=1, max_size=5), st.tuples(st.integers(1, 50), st.integers(1, 20))
)
def test_what_is_promised_delays_no_row_that_waits(first, blocked):
    """All that is lendable is lent for good, and a row that could not begin has its place still:
    the reserve and the room that new rows begin with are not lent."""
    scheduler = make(40, "lend", max_num_batched_tokens=ANY, block_size=2)
    for number, (prompt, output) in enumerate(first):
        add(scheduler, number, prompt, output)
    while scheduler.waiting:
        step(scheduler)
    foresight, row = scheduler.foresight, add(scheduler, len(first), *blocked)
    expected = [foresight.expected_kv(other) for other in scheduler.running]
    place = foresight.start(expected, foresight.expected_kv(row), 40 - 1) if expected else 0
    lendable = scheduler.demand().lendable
    event(f"fragment: {bool(lendable and expected and lacking(scheduler))}")
    scheduler.rm.lender.settle({3: scheduler.rm.lender.promise(lendable)})
    steps = 0
    while row in scheduler.waiting:
        assert steps <= place
        step(scheduler)
        steps += 1


@settings(deadline=None)
@given(
    st.integers(2, 30),
    st.lists(st.tuples(st.integers(0, 10), row_sizes), min_size=1, max_size=20),
)
def test_nobody_is_preempted_if_all_outputs_are_as_long_as_expected(num_blocks, arrivals):
    """Rows come some steps after each other, and go to their limits."""
    scheduler = make(num_blocks, max_num_batched_tokens=ANY)
    sequences = []
    for pause, (prompt, output) in arrivals:
        if prompt + output - 1 <= num_blocks * BLOCK:
            sequences.append(add(scheduler, len(sequences), prompt, output))
        for _ in range(pause):
            step(scheduler)
    for _ in range(40 * len(sequences)):
        step(scheduler)
    assert all(sequence.finish_reason() == "length" for sequence in sequences)
    assert scheduler.counters.preemptions == scheduler.counters.stalls == 0


# -- those that were refused are not looked at every time ------------------------------------------


class Watched:
    """A scheduler of which every admission is compared with that of one that remembers nothing."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.hidden = 0
        """Admissions in a row in which a row that may begin was not looked at."""
        self._scheduler, self._admission = scheduler, scheduler._admission
        self._next = self._admission.next
        self._seen: tuple[object, ...] = ()
        self._admission.next = self.next

    def next(self, state: State) -> TokenSequence | None:
        assert state is self._scheduler
        orders, rm = state.orders, state.rm
        expected, got = Admission().next(state), self._next(state)
        rows = [[sequence.id for sequence in some] for some in (state.waiting, state.running)]
        seen = (orders.before, orders.keep, rm.borrower.credit, rm.lender.promised, *rows)
        self.hidden = self.hidden + 1 if got is not expected else 0
        if self.hidden:
            assert got is None
            assert seen == self._seen, "somebody came or went, or an answer did"
        assert self.hidden <= REFUSED_STEPS
        self._seen = seen
        return got


EVENTS = ("keep", "before", "credit", "promise")


def happen(scheduler: Scheduler, name: str, number: int, pick: random.Random) -> None:
    if name == "keep":
        answer(scheduler, keep=pick.choice((0, 0, 10)))
    elif name == "before":
        answer(scheduler, admit_before=pick.choice((0, number, NOBODY)))
    elif name == "credit":
        scheduler.rm.borrower.credit_opened(3, pick.randint(1, 10))
    elif scheduler.rm.lender.promised:
        scheduler.rm.lender.settle({})
    else:
        scheduler.rm.lender.promise(pick.randint(1, 10))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32),
    st.integers(15, 40),
    st.sampled_from((4, 16, ANY)),
    st.sampled_from(("lend", "lend-greedy")),
    st.booleans(),
)
def test_a_row_that_may_begin_is_seen_at_once_or_after_a_few_steps_in_which_nothing_happened(
    seed, num_blocks, budget, policy, short
):
    pick = random.Random(seed)
    scheduler = make(num_blocks, policy, max_num_batched_tokens=budget)
    if short:
        expect_short(scheduler)
    Watched(scheduler)
    for number in range(100):
        if pick.random() < 0.15 and len(scheduler.waiting) < CANDIDATES:
            add(scheduler, number, pick.randint(1, 40), pick.randint(1, 60))
        if pick.random() < 0.1:
            happen(scheduler, pick.choice(EVENTS), number, pick)
        step(scheduler)
        scheduler.rm.borrower.settle(3)  # its header says what was released and returned


def test_a_row_is_looked_at_again_as_it_begins_later():
    """Beside row 0, which has 41 tokens in its last step, row 1 has 50 when it ends if it begins at
    once: in 23.75 rBlocks of 23. It fits if it begins three steps later."""
    scheduler = make(num_blocks=24, max_num_batched_tokens=ANY)
    add(scheduler, 0, prompt=1, max_tokens=40)
    add(scheduler, 1, prompt=10, max_tokens=60)
    for _ in range(3 + REFUSED_STEPS):
        step(scheduler)
    assert running(scheduler) == [0, 1]
