"""Who gets which row, against a search through all instances for every row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control import assign
from hpc_distkv.control.assign import Assignment
from hpc_distkv.control.messages import Request, Result, Sampling, pack_tokens

PLENTY = 10**6
INSTANCES = 4

Rooms = list[tuple[int, int, float]]
"""(rows, prompt tokens, work that is left) of every instance."""

sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=40)
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


def give(assignment: Assignment, room: Rooms) -> dict[int, list[int]]:
    """Ids of the rows that instances get."""
    given_rows = assignment.assign(*(np.array(column) for column in zip(*room, strict=True)))
    return {instance: [row.id for row in some] for instance, some in given_rows.items()}


def finish(assignment: Assignment, number: int, tokens: int = 1) -> None:
    assignment.finish(Result(number, pack_tokens(range(tokens)), "stop", 0.1, 0.2))


# -- one queue for all ------------------------------------------------------------------------


@given(sizes, rooms, st.sampled_from((64.0, float("inf"))))
def test_every_row_goes_where_least_work_is_predicted(lengths, room, attention_tokens):
    """A row of P prompt and O output tokens is P + O tokens, each of which attends to as many as
    are before it, in the mean to half of them. All numbers here are exact in floating point."""
    left = [list(instance) for instance in room]
    expected: dict[int, list[int]] = {}
    for number, (prompt, output) in enumerate(lengths):
        open_to_it = [i for i, (seats, tokens, _) in enumerate(left) if seats > 0 and tokens > 0]
        if not open_to_it:
            break
        chosen = min(open_to_it, key=lambda i: left[i][2])
        expected.setdefault(chosen, []).append(number)
        total = prompt + output
        left[chosen][0] -= 1
        left[chosen][1] -= prompt
        left[chosen][2] += sum(1 + p / attention_tokens for p in np.arange(total) + 0.5)
    assignment = Assignment(iter(rows(lengths)), INSTANCES, attention_tokens=attention_tokens)
    assert give(assignment, room) == expected


@given(sizes, st.lists(rooms, max_size=12), st.booleans(), st.data())
def test_no_row_is_lost_or_given_twice_or_beyond_the_room(lengths, rounds, queue, data):
    source = iter(rows(lengths))
    assignment = Assignment(source, INSTANCES, queue)
    home: dict[int, int] = {}
    for room in rounds:
        for instance, numbers in give(assignment, room).items():
            seats, tokens, _ = room[instance]
            assert 0 < len(numbers) <= seats
            assert sum(lengths[n][0] for n in numbers[:-1]) < tokens
            assert numbers == sorted(numbers)
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


def test_rows_are_pulled_only_while_there_is_room():
    source = iter(rows([(10, 1)] * 100))
    assignment = Assignment(source, 2)
    assert give(assignment, [(3, 1000, 0.0), (0, 1000, 0.0)]) == {0: [0, 1, 2]}
    assert give(assignment, [(0, 0, 0.0), (50, 25, 0.0)]) == {1: [3, 4, 5]}
    assert next(source).id == 6
    assert not assignment.exhausted


def test_a_long_row_counts_by_its_work_and_not_as_one():
    assignment = Assignment(iter(rows([(900, 100), *[(50, 50)] * 9])), 2)
    given_rows = give(assignment, [(PLENTY, PLENTY, 0.0)] * 2)
    assert given_rows == {0: [0], 1: [*range(1, 10)]}


def test_attention_makes_a_long_row_more_work_than_its_tokens_in_short_ones():
    lengths = [(900, 100), *[(50, 50)] * 30]
    even = Assignment(iter(rows(lengths)), 2)
    assert len(give(even, [(PLENTY, PLENTY, 0.0)] * 2)[1]) == 20
    # At 500 tokens attention costs as much as all else: 1000 (1 + 1) against 100 (1 + 0.1).
    steep = Assignment(iter(rows(lengths)), 2, attention_tokens=500.0)
    given_rows = give(steep, [(PLENTY, PLENTY, 0.0)] * 2)
    assert given_rows[1][:19] == [*range(1, 20)]
    assert len(given_rows[1]) == 19 + 11 // 2


def test_the_last_rows_spread_over_all_instances():
    lengths = [(10, 10)] * INSTANCES
    given_rows = give(Assignment(iter(rows(lengths)), INSTANCES), [(9, 99, 0.0)] * INSTANCES)
    assert given_rows == {i: [i] for i in range(INSTANCES)}


def test_the_last_rows_go_to_those_that_are_done_first():
    room = [(9, 999, work) for work in (500.0, 20.0, 0.0, 90.0)]
    given_rows = give(Assignment(iter(rows([(20, 20)] * 4)), INSTANCES), room)
    assert given_rows == {2: [0, 2], 1: [1, 3]}


def test_outputs_are_expected_to_be_as_long_as_those_seen():
    """Row 10 + 1000 was long as long as nothing was known, and is short when outputs have 2."""

    def third_row_goes_to(assignment: Assignment) -> int:
        room = [(PLENTY, PLENTY, 0.0)] * 2
        given_rows = give(assignment, room)
        return next(i for i, numbers in given_rows.items() if max(numbers) == max(assignment.home))

    lengths = [(10, 1000), (100, 10), (1, 1)]
    assert third_row_goes_to(Assignment(iter(rows(lengths)), 2)) == 1
    informed = Assignment(iter(rows([(1, 5), *lengths])), 2)
    assert give(informed, [(1, 9, 0.0), (0, 0, 0.0)]) == {0: [0]}
    finish(informed, 0, tokens=2)
    assert third_row_goes_to(informed) == 0


def test_a_row_that_moved_is_finished_by_its_new_home():
    assignment = Assignment(iter(rows([(5, 5)])), 2)
    give(assignment, [(1, 9, 0.0), (0, 0, 0.0)])
    assignment.home[0] = 1
    finish(assignment, 0)
    assert assignment.home == {}


# -- dealt out beforehand ---------------------------------------------------------------------


@given(sizes, st.lists(rooms, max_size=12))
def test_isolated_instances_get_their_rows_in_turn_whatever_their_load(lengths, rounds):
    assignment = Assignment(iter(rows(lengths)), INSTANCES, queue=False)
    got: dict[int, list[int]] = {i: [] for i in range(INSTANCES)}
    for room in [*rounds, [(PLENTY, PLENTY, 0.0)] * INSTANCES]:
        for instance, numbers in give(assignment, room).items():
            got[instance] += numbers
    for instance, numbers in got.items():
        assert numbers == list(range(instance, len(lengths), INSTANCES))


def test_an_isolated_instance_takes_no_rows_of_another_though_it_idles():
    assignment = Assignment(iter(rows([(5, 5)] * 8)), 2, queue=False)
    assert give(assignment, [(9, 99, 0.0), (0, 0, 0.0)]) == {0: [0, 2, 4, 6]}
    assert give(assignment, [(9, 99, 0.0), (0, 0, 0.0)]) == {}
    assert assignment.waiting
    assert give(assignment, [(9, 99, 0.0), (1, 99, 0.0)]) == {1: [1]}


def test_rows_are_dealt_only_so_far_ahead_of_an_instance_that_has_no_room(monkeypatch):
    monkeypatch.setattr(assign, "DEALT_AHEAD", 3)
    source = iter(rows([(5, 5)] * 20))
    assignment = Assignment(source, 2, queue=False)
    idle, busy = (PLENTY, PLENTY, 0.0), (0, 0, 0.0)
    assert give(assignment, [idle, busy]) == {0: [0, 2, 4, 6]}
    assert give(assignment, [idle, busy]) == {}
    assert next(source).id == 7, "the rows of the busy one wait, and so do all behind them"


@pytest.mark.parametrize("queue", [True, False])
def test_a_job_without_rows_is_done_when_rows_were_looked_for(queue):
    assignment = Assignment(iter(()), 3, queue)
    assert not assignment.done
    assert give(assignment, [(1, 1, 0.0)] * 3) == {}
    assert assignment.done
