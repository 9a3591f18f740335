"""Who gets which row, against a search through all instances for every row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from gmanager_rounds import assignment_of
from hypothesis import example, given
from hypothesis import strategies as st

from hpc_distkv.control.assign import assignment as module
from hpc_distkv.control.assign import queue as queue_module
from hpc_distkv.control.assign.assignment import Assignment
from hpc_distkv.control.assign.queue import LOOK_AHEAD, READ_AT_ONCE, SyncSource
from hpc_distkv.control.messages.requests import Request, Result, Sampling, pack_tokens

PLENTY = 10**6
INSTANCES = 4

Rooms = list[tuple[int, int, float]]
"""(rows, prompt tokens, work that is left) of every instance."""

lengths_of_rows = st.tuples(st.integers(1, 60), st.integers(1, 60))
sizes = st.lists(lengths_of_rows, max_size=40)
rooms = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 150), st.sampled_from((0.0, 30.0, 100.0))),
    min_size=INSTANCES,
    max_size=INSTANCES,
)


def rows(lengths: list[tuple[int, int]]) -> list[Request]:
    return [
        Request(number, pack_tokens(range(prompt)), Sampling(max_tokens=output))
        for number, (prompt, output) in enumerate(lengths)
    ]


class Late:
    """A source whose rows come by and by: in each round the first so many of them are there."""

    def __init__(self, requests: list[Request], there: list[int]) -> None:
        self._requests, self.there = requests, there
        self.round = self._taken = 0

    @property
    def ended(self) -> bool:
        return self.round == len(self.there) and self._taken == len(self._requests)

    def take(self) -> Request | None:
        there = [*self.there, len(self._requests)][self.round]
        if self._taken == there:
            return None
        self._taken += 1
        return self._requests[self._taken - 1]


def give(assignment: Assignment, room: Rooms, step_tokens: float = 1.0) -> dict[int, list[int]]:
    """Ids of the rows that instances get."""
    columns = (np.array(column) for column in zip(*room, strict=True))
    given_rows = assignment.assign(*columns, step_tokens)
    return {instance: [row.id for row in some] for instance, some in given_rows.items()}


def finish(assignment: Assignment, number: int, tokens: int = 1) -> None:
    assignment.finish(Result(number, pack_tokens(range(tokens)), "stop", 0.1, 0.2))


# -- one queue for all ------------------------------------------------------------------------


def longest_first(lengths: list[tuple[int, int]], attention_tokens: float) -> list[int]:
    """Rows in the order in which they are given if the last ones are in sight from the first: those
    that take longest come first. So far a step takes as long as a prompt token."""

    def duration(number: int) -> float:
        prompt, output = lengths[number]
        return output + sum(1 + p / attention_tokens for p in np.arange(prompt) + 0.5)

    return sorted(range(len(lengths)), key=lambda number: (-duration(number), number))


@given(
    st.lists(lengths_of_rows, max_size=READ_AT_ONCE - 1),
    rooms,
    st.sampled_from((64.0, float("inf"))),
)
def test_every_row_goes_where_least_work_is_predicted(lengths, room, attention_tokens):
    """A row of P prompt and O output tokens is P + O tokens, each of which attends to as many as
    are before it, in the mean to half of them. All numbers here are exact in floating point."""
    left = [list(instance) for instance in room]
    expected: dict[int, list[int]] = {}
    for number in longest_first(lengths, attention_tokens):
        prompt, output = lengths[number]
        open_to_it = [i for i, (seats, tokens, _) in enumerate(left) if seats > 0 and tokens > 0]
        if not open_to_it:
            break
        chosen = min(open_to_it, key=lambda i: left[i][2])
        expected.setdefault(chosen, []).append(number)
        total = prompt + output
        left[chosen][0] -= 1
        left[chosen][1] -= prompt
        left[chosen][2] += sum(1 + p / attention_tokens for p in np.arange(total) + 0.5)
    assignment = assignment_of(
        SyncSource(rows(lengths)), INSTANCES, attention_tokens=attention_tokens
    )
    assert give(assignment, room) == expected


@given(sizes, st.lists(rooms, max_size=12), st.booleans(), st.data())
def test_no_row_is_lost_or_given_twice_or_beyond_the_room(lengths, rounds, queue, data):
    source = iter(rows(lengths))
    assignment = assignment_of(SyncSource(source), INSTANCES, queue)
    home: dict[int, int] = {}
    for room in rounds:
        for instance, numbers in give(assignment, room).items():
            seats, tokens, _ = room[instance]
            assert 0 < len(numbers) <= seats
            assert sum(lengths[n][0] for n in numbers[:-1]) < tokens
            assert numbers == sorted(numbers) or (queue and assignment.queue.exhausted)
            assert not home.keys() & set(numbers)
            home |= dict.fromkeys(numbers, instance)
        assert assignment.home == {n: i for n, i in home.items() if i >= 0}
        if going := sorted(assignment.home):
            done = data.draw(st.sampled_from(going))
            finish(assignment, done)
            home[done] = -1
    ample: Rooms = [(PLENTY, PLENTY, 0.0)] * INSTANCES
    for instance, numbers in give(assignment, ample).items():
        assert not home.keys() & set(numbers)
        home |= dict.fromkeys(numbers, instance)
    assert sorted(home) == list(range(len(lengths)))
    assert next(source, None) is None
    for number in list(assignment.home):
        assert not assignment.done
        finish(assignment, number)
    give(assignment, ample)
    assert assignment.done
    assert not assignment.waiting


def test_rows_are_given_only_while_there_is_room():
    assignment = assignment_of(SyncSource(rows([(10, 1)] * 100)), 2)
    assert give(assignment, [(3, 1000, 0.0), (0, 1000, 0.0)]) == {0: [0, 1, 2]}
    assert give(assignment, [(0, 0, 0.0), (50, 25, 0.0)]) == {1: [3, 4, 5]}
    assert not assignment.queue.exhausted


@given(st.lists(rooms, max_size=12), st.booleans(), st.sampled_from((3, PLENTY)))
def test_rows_are_read_ahead_only_so_far_and_by_and_by(rounds, queue, most):
    """Dealt rows aside, which are read for instances that have no room yet."""
    read = 0

    def source() -> Iterator[Request]:
        nonlocal read
        while True:
            read += 1
            yield rows([(1, 1)])[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "MOST_AHEAD", most)
        assignment = assignment_of(SyncSource(source()), INSTANCES, queue)
    taken = 0
    for room in rounds:
        some = assignment.assign(*(np.array(column) for column in zip(*room, strict=True)))
        taken += sum(map(len, some.values()))
        taken_or_dealt = taken + sum(map(len, assignment._dealt or ()))
        assert read <= taken_or_dealt + min(INSTANCES * LOOK_AHEAD, most)
        assert read <= taken_or_dealt * READ_AT_ONCE


@given(sizes, st.data(), st.booleans())
def test_rows_that_are_not_there_yet_are_looked_for_again_until_the_source_has_ended(
    lengths, data, queue
):
    """Each round takes what is there; only the end of the source is the end."""
    late = st.lists(st.integers(0, len(lengths)), max_size=6)
    source = Late(rows(lengths), sorted(data.draw(late)))
    assignment = assignment_of(source, INSTANCES, queue)
    ample: Rooms = [(PLENTY, PLENTY, 0.0)] * INSTANCES
    given_rows: list[int] = []
    for there in source.there:
        given_rows += itertools.chain(*give(assignment, ample).values())
        assert sorted(given_rows) == list(range(there))
        assert (assignment.queue.exhausted, assignment.done) == (False, False)
        source.round += 1
    given_rows += itertools.chain(*give(assignment, ample).values())
    assert assignment.queue.exhausted
    assert sorted(given_rows) == list(range(len(lengths)))


@given(st.lists(rooms, max_size=12), st.booleans(), st.integers(1, 200))
def test_no_more_tokens_are_read_ahead_than_may_be(rounds, queue, most):
    """And one row beyond, however long it is."""
    read = 0

    def source() -> Iterator[Request]:
        nonlocal read
        for number in itertools.count():
            [row] = rows([(1 + 7 * number % 60, 1)])
            read += row.length
            yield msgspec.structs.replace(row, id=number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "MOST_TOKENS_AHEAD", most)
        assignment = assignment_of(SyncSource(source()), INSTANCES, queue)
        given_tokens = 0
        for room in rounds:
            some = assignment.assign(*(np.array(column) for column in zip(*room, strict=True)))
            given_tokens += sum(row.length for hand in some.values() for row in hand)
            if some:  # The first one comes back.
                back = next(iter(some.values()))[0]
                assignment.take_back(back)
                given_tokens -= back.length
            assert read - given_tokens < most + 2 * 60


def in_order(count: int) -> int:
    """Rows of `count` that one instance, with room for one at a time, gets before the last ones are
    in sight."""
    return next(
        given_before
        for given_before in itertools.count()
        if min(READ_AT_ONCE * (given_before + 1), given_before + LOOK_AHEAD) > count
    )


@given(st.lists(lengths_of_rows, max_size=60))
@example([(5, 1), *[(1, number) for number in range(1, 50)]])
def test_rows_keep_their_order_until_the_last_are_in_sight_then_the_longest_come_first(lengths):
    assignment = assignment_of(SyncSource(rows(lengths)), 1)
    order = []
    while given_rows := give(assignment, [(1, PLENTY, 0.0)]):
        order += given_rows[0]
    before = in_order(len(lengths))
    last = longest_first(lengths[before:], float("inf"))
    assert order == [*range(before), *(before + number for number in last)]
    assert len(lengths) - before >= min(len(lengths), LOOK_AHEAD) - 2


def test_the_longest_row_is_the_one_that_takes_most_time():
    """A step takes as long as 10 tokens of prompt, and outputs come to half of their limits."""
    lengths = [(90, 20), (1, 30), (150, 1), (1, 20)]
    assignment = assignment_of(SyncSource(rows([(999, 2), *lengths])), 1)
    assignment.queue._most_ahead = 1
    assert give(assignment, [(1, 999, 0.0)]) == {0: [0]}
    finish(assignment, 0, tokens=1)
    assignment.queue._most_ahead = PLENTY
    assert give(assignment, [(9, 999, 0.0)], step_tokens=10.0) == {0: [1, 3, 2, 4]}


def test_rows_that_come_back_are_given_before_all_others():
    given_first = rows([(1, 1)] * 3)
    assignment = assignment_of(SyncSource([*given_first, *rows([(1, 1)] * 99)[3:]]), 1)
    give(assignment, [(3, 99, 0.0)])
    assignment.take_back(given_first[2])
    assert assignment.home.keys() == {0, 1}
    assert give(assignment, [(2, 99, 0.0)]) == {0: [2, 3]}


def test_prompts_are_work_for_each_token_of_output_that_is_expected():
    first, second = rows([(10, 20), (30, 20)])
    assignment = assignment_of(SyncSource([first, second]), 1)
    assert assignment.prompt_work == 0.0
    give(assignment, [(2, 99, 0.0)])
    assert assignment.prompt_work == (10 + 30) / (20 + 20)
    assignment.take_back(second)
    assert assignment.prompt_work == 10 / 20
    give(assignment, [(1, 99, 0.0)])
    finish(assignment, 0, tokens=5)
    assert assignment.prompt_work == (10 + 30) / ((20 + 20) / 4)


def test_a_long_row_counts_by_its_work_and_not_as_one():
    assignment = assignment_of(SyncSource(rows([(900, 100), *[(50, 50)] * 9])), 2)
    given_rows = give(assignment, [(PLENTY, PLENTY, 0.0)] * 2)
    assert given_rows == {0: [0], 1: [*range(1, 10)]}


def test_attention_makes_a_long_row_more_work_than_its_tokens_in_short_ones():
    lengths = [(900, 100), *[(50, 50)] * 30]
    even = assignment_of(SyncSource(rows(lengths)), 2)
    assert len(give(even, [(PLENTY, PLENTY, 0.0)] * 2)[1]) == 20
    # At 500 tokens attention costs as much as all else: 1000 (1 + 1) against 100 (1 + 0.1).
    steep = assignment_of(SyncSource(rows(lengths)), 2, attention_tokens=500.0)
    given_rows = give(steep, [(PLENTY, PLENTY, 0.0)] * 2)
    assert given_rows[1][:19] == [*range(1, 20)]
    assert len(given_rows[1]) == 19 + 11 // 2


def test_the_last_rows_spread_over_all_instances():
    lengths = [(10, 10)] * INSTANCES
    given_rows = give(
        assignment_of(SyncSource(rows(lengths)), INSTANCES), [(9, 99, 0.0)] * INSTANCES
    )
    assert given_rows == {i: [i] for i in range(INSTANCES)}


def test_the_last_rows_go_to_those_that_are_done_first():
    room = [(9, 999, work) for work in (500.0, 20.0, 0.0, 90.0)]
    given_rows = give(assignment_of(SyncSource(rows([(20, 20)] * 4)), INSTANCES), room)
    assert given_rows == {2: [0, 2], 1: [1, 3]}


def test_outputs_are_expected_to_be_as_large_a_part_of_their_limits_as_those_seen():
    """Row 10 + 1000 is long as long as nothing is known, and short when outputs come to 1% of their
    limits: then the last row goes where it went."""
    lengths, room = [(10, 1000), (100, 10), (1, 1)], [(PLENTY, PLENTY, 0.0)] * 2
    assert give(assignment_of(SyncSource(rows(lengths)), 2), room) == {0: [0], 1: [1, 2]}
    informed = assignment_of(SyncSource(rows([(1, 5000), *lengths])), 2)
    assert give(informed, [(1, 9, 0.0), (0, 0, 0.0)]) == {0: [0]}
    finish(informed, 0, tokens=50)
    assert give(informed, room) == {0: [1, 3], 1: [2]}


def test_a_row_that_moved_is_finished_by_its_new_home():
    assignment = assignment_of(SyncSource(rows([(5, 5)])), 2)
    give(assignment, [(1, 9, 0.0), (0, 0, 0.0)])
    assignment.home[0] = 1
    finish(assignment, 0)
    assert assignment.home == {}


# -- dealt out beforehand ---------------------------------------------------------------------


@given(sizes, st.lists(rooms, max_size=12))
def test_isolated_instances_get_their_rows_in_turn_whatever_their_load(lengths, rounds):
    assignment = assignment_of(SyncSource(rows(lengths)), INSTANCES, queue=False)
    got: dict[int, list[int]] = {i: [] for i in range(INSTANCES)}
    for room in [*rounds, [(PLENTY, PLENTY, 0.0)] * INSTANCES]:
        for instance, numbers in give(assignment, room).items():
            got[instance] += numbers
    for instance, numbers in got.items():
        assert numbers == list(range(instance, len(lengths), INSTANCES))


def test_an_isolated_instance_takes_no_rows_of_another_though_it_idles():
    assignment = assignment_of(SyncSource(rows([(5, 5)] * 8)), 2, queue=False)
    assert give(assignment, [(9, 99, 0.0), (0, 0, 0.0)]) == {0: [0, 2, 4, 6]}
    assert give(assignment, [(9, 99, 0.0), (0, 0, 0.0)]) == {}
    assert assignment.waiting
    assert give(assignment, [(9, 99, 0.0), (1, 99, 0.0)]) == {1: [1]}


def test_rows_are_dealt_only_so_far_ahead_of_an_instance_that_has_no_room(monkeypatch):
    monkeypatch.setattr(module, "DEALT_AHEAD", 3)
    source = iter(rows([(5, 5)] * 99))
    assignment = assignment_of(SyncSource(source), 2, queue=False)
    idle, busy = (PLENTY, PLENTY, 0.0), (0, 0, 0.0)
    assert give(assignment, [idle, busy]) == {0: [0, 2, 4, 6]}
    assert give(assignment, [idle, busy]) == {}
    assert give(assignment, [idle, busy]) == {}
    ahead = next(source).id - 7
    assert ahead <= 2 * LOOK_AHEAD, "the rows of the busy one wait, and so do all behind them"


@pytest.mark.parametrize("queue", [True, False])
def test_a_job_without_rows_is_done_when_rows_were_looked_for(queue):
    assignment = assignment_of(SyncSource(()), 3, queue)
    assert not assignment.done
    assert give(assignment, [(1, 1, 0.0)] * 3) == {}
    assert assignment.done
