"""When rows too large for one pool begin."""

from __future__ import annotations

import numpy as np
import pytest
from gmanager_rounds import Job, assignment_of
from hypothesis import given
from hypothesis import strategies as st
from made_reports import report

from hpc_distkv.control.assign.large import SHARE, peak
from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.messages.reports import Changes, Large, Report, ReportError
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.control.policy import POLICIES

BLOCK = 32
STEP = 10.0

numbers = st.integers(0, 50)
larges = st.builds(
    lambda held, more, prompt, output: Large(0, True, held, held + more, prompt, output),
    numbers,
    numbers,
    numbers,
    st.integers(1, 20),
)


# -- how much they have at once -----------------------------------------------------------------


@given(st.lists(larges, min_size=1, max_size=5))
def test_the_peak_is_the_most_of_all_moments(rows):
    def held(row: Large, moment: float) -> float:
        if moment > row.prompt + row.output * STEP:
            return 0.0
        part = min(1.0, moment / row.prompt) if row.prompt else 1.0
        return row.held + part * (row.blocks - row.held)

    moments = np.arange(0, 260 + 1)  # all ends are whole numbers
    most = max(sum(held(row, moment) for row in rows) for moment in moments)
    assert peak(rows, STEP) == pytest.approx(most)


def test_a_row_that_ends_before_another_has_grown_takes_no_room_from_it():
    ending = Large(0, True, 10, 10, 0.0, 1.0)
    growing = Large(1, True, 0, 10, 100.0, 5.0)
    assert peak([ending, growing], STEP) == pytest.approx(11)
    assert peak([ending, growing], step_tokens=100.0) == pytest.approx(20)


# -- who begins ---------------------------------------------------------------------------------


def large(number: int, blocks: int, begun: bool = False, held: int = 0, prompt: int = 100) -> Large:
    return Large(number, begun, held, blocks, float(prompt), 1000.0)


def with_large(*rows: Large, **fields: object) -> Report:
    """A report of an instance with 100 rBlocks."""
    fields = {"capacity": 100, "free": 100, "seats": 8, "fixed": 0.1, "running": 1} | fields
    return report(changes=Changes(large=list(rows)), **fields)


def begun(job: Job, *reports: Report) -> list[list[int]]:
    job.manager.assignment.home |= {
        row.request: instance for instance, some in enumerate(reports) for row in some.changes.large
    }
    return [answer.begin for answer in job.round(*reports)]


def test_one_that_is_alone_begins_whatever_it_needs():
    assert begun(Job(2), with_large(large(0, 199)), with_large()) == [[0], []]


def test_those_begin_that_have_room_together():
    rows = [with_large(large(n, blocks)) for n, blocks in enumerate((110, 120, 90, 101))]
    room = SHARE * 400
    assert 110 + 120 + 90 <= room < 110 + 120 + 90 + 101
    assert begun(Job(4), *rows) == [[0], [1], [2], []]


def test_nobody_passes_an_older_one_that_waits_for_the_same_room():
    rows = with_large(large(3, 110)), with_large(large(1, 110)), with_large(large(2, 180))
    assert begun(Job(3), *rows) == [[], [1], []]


def test_one_that_needs_little_beside_what_others_share_passes():
    first = large(0, 150, begun=True, held=150, prompt=0)
    waiting, sharing = with_large(large(1, 150)), with_large(first, large(2, 20))
    assert begun(Job(2), waiting, sharing) == [[], [2]]
    sharing = with_large(first, large(2, 21))
    assert begun(Job(2), waiting, sharing) == [[], []]


def test_those_that_have_begun_count_with_what_they_come_to_have():
    going_on = with_large(large(0, 190, begun=True, held=20, prompt=50))
    assert begun(Job(3), going_on, with_large(large(1, 110)), with_large()) == [[], [], []]
    ending = with_large(Large(0, True, 190, 190, 0.0, 0.1))
    assert begun(Job(3), ending, with_large(large(1, 110)), with_large()) == [[], [1], []]


def test_prompts_at_one_home_come_one_after_the_other():
    first = large(0, 101, begun=True, held=10, prompt=50)
    assert begun(Job(4), with_large(first, large(1, 101)), *[with_large()] * 3)[0] == []
    decoding = large(0, 101, begun=True, held=101, prompt=0)
    assert begun(Job(4), with_large(decoding, large(1, 101)), *[with_large()] * 3)[0] == [1]
    assert begun(Job(4), with_large(first, large(1, 100)), *[with_large()] * 3)[0] == [1]


def test_rows_out_of_each_others_reach_do_not_wait_for_each_other():
    rows = [with_large(large(n, 150)) for n in range(4)]
    assert begun(Job(4, nodes=[0, 0, 1, 1]), *rows) == [[0], [], [2], []]


# -- rows that have no home yet -----------------------------------------------------------------


def prompt(number: int, tokens: int) -> Request:
    return Request(number, pack_tokens([0] * tokens), Sampling(max_tokens=64))


def test_a_row_too_large_gets_its_home_when_it_begins():
    """The one with most room that has none yet."""
    rows = [prompt(0, 150 * BLOCK), prompt(1, 10), prompt(2, 150 * BLOCK)]
    job = Job(2, rows, POLICIES["lend"], block_size=BLOCK)
    reports = with_large(free=10, room_requests=8, room_tokens=99), with_large(free=20)
    answers = job.round(*reports)
    assert [[r.id for r in answer.assign] for answer in answers] == [[1], [0]]
    assert [answer.begin for answer in answers] == [[], [0]]
    assert job.manager.assignment.home == {0: 1, 1: 0}
    reports = with_large(), with_large(large(0, 152, begun=True, held=150, prompt=0))
    assert [answer.begin for answer in job.round(*reports)] == [[], []]
    reports = with_large(free=10), with_large(Large(0, True, 152, 152, 0.0, 0.1))
    assert [answer.begin for answer in job.round(*reports)] == [[2], []]


def test_a_row_too_large_gets_a_home_with_a_seat():
    job = Job(3, [prompt(0, 150 * BLOCK)], POLICIES["lend"], block_size=BLOCK)
    answers = job.round(
        with_large(free=30, seats=0), with_large(free=20, seats=1), with_large(free=9)
    )
    assert [answer.begin for answer in answers] == [[], [0], []]


def test_rows_too_large_that_wait_are_not_read_without_end():
    assignment = assignment_of(SyncSource([prompt(n, 50) for n in range(1000)]), 2)
    room = np.array([1000, 1000])
    assert assignment.assign(room, room, np.zeros(2), large_from=40) == {}
    assert len(assignment.large(1000, np.zeros(2))) < 100
    assert assignment.waiting
    assert assignment.unfinished < 200


def test_what_is_expected_of_a_row_that_goes_on():
    """20 tokens of an earlier run, out of at most 64."""
    request = Request(0, pack_tokens([0] * 300), Sampling(max_tokens=64), pack_tokens([0] * 20))
    assignment = assignment_of(SyncSource([request]), 1)
    room = np.array([1000])
    assignment.assign(room, room, np.zeros(1), large_from=100)
    assert assignment.large(5, np.zeros(1)) == [Large(0, False, 0, 12, 320.0, 44.0)]


def test_a_row_too_large_whose_beginning_is_somewhere_is_like_any_other():
    """It goes where that is."""
    document = pack_tokens(range(150 * BLOCK))
    rows = [Request(n, document + pack_tokens([n] * 9), Sampling(max_tokens=8)) for n in range(3)]
    job = Job(3, rows, POLICIES["lend"], block_size=BLOCK, enable_prefix_caching=True)
    room = {"room_requests": 8, "room_tokens": 9999}
    answers = job.round(
        with_large(**room), with_large(capacity=101, free=101, **room), with_large(**room)
    )
    assert [[r.id for r in answer.assign] for answer in answers] == [[], [0], []]
    reports = with_large(**room), with_large(large(0, 151, begun=True), **room), with_large(**room)
    assert [[r.id for r in answer.assign] for answer in job.round(*reports)] == [[], [1, 2], []]


def test_a_row_waits_for_its_beginning_unless_others_have_much_less_to_do():
    document = pack_tokens(range(150 * BLOCK))
    rows = [Request(n, document + pack_tokens([n] * 9), Sampling(max_tokens=8)) for n in range(3)]

    def homes(work_left: float) -> list[list[int]]:
        job = Job(3, rows, POLICIES["lend"], block_size=BLOCK, enable_prefix_caching=True)
        assert [len(answer.assign) for answer in job.round(*[with_large()] * 3)] == [1, 0, 0]
        ending = Large(0, True, 152, 152, 0.0, 0.1)
        full = with_large(ending, work_left=work_left, room_requests=0)
        return [[r.id for r in answer.assign] for answer in job.round(full, *[with_large()] * 2)]

    assert homes(140.0 * BLOCK) == [[], [], []]
    assert homes(200.0 * BLOCK) == [[], [1], []]


def test_rows_that_wait_do_not_hold_up_small_ones():
    rows = [prompt(n, 50) for n in range(40)] + [prompt(40, 10)]
    assignment = assignment_of(SyncSource(rows), 1)
    room = np.array([1000])
    given = [assignment.assign(room, room, np.zeros(1), large_from=40) for _ in range(10)]
    assert [r.id for some in given for r in some.get(0, [])] == []
    for row in assignment.large(30, np.zeros(1)):
        assignment.give_large(row.request, 0)
    given = [assignment.assign(room, room, np.zeros(1), large_from=40) for _ in range(10)]
    assert [r.id for some in given for r in some.get(0, [])] == [40]


def test_a_row_too_large_is_reported_by_its_home_alone():
    job = Job(2)
    with pytest.raises(ReportError, match="instance 0 reports request 7"):
        job.round(with_large(large(7, 150)), with_large())
    job.manager.assignment.home[7] = 1
    with pytest.raises(ReportError, match="instance 0 reports request 7"):
        job.round(with_large(large(7, 150)), with_large())


def test_rows_that_reach_beyond_their_node_count_everywhere():
    everywhere = large(0, 390, begun=True, held=390, prompt=0)
    reports = with_large(everywhere), with_large(), with_large(large(1, 150)), with_large()
    assert begun(Job(4, nodes=[0, 0, 1, 1]), *reports) == [[], [], [], []]


# -- room for them ------------------------------------------------------------------------------


def test_what_becomes_free_is_left_to_those_that_have_begun():
    row = large(0, 200, begun=True, held=10)
    short = with_large(row, wanted=9, wanted_for=0, largest=200, free=4)
    job = Job(3)
    job.manager.assignment.home[0] = 0
    answers = job.round(short, report(promised=2), report(promised=3))
    assert answers[0].granted == 5
    assert answers[0].keep == 4, "it has that already"
    assert [answer.keep for answer in answers[1:]] == [2, 2]
    other = report(wanted=9, wanted_for=0, largest=20, free=4)
    assert [a.keep for a in Job(3).round(other, report(promised=2), report(promised=3))] == [0] * 3


def test_no_more_is_kept_free_than_is_missing_but_for_rounding():
    """50 rows lack 5 rBlocks each, and 150 instances have room."""
    debtors = [
        with_large(large(n, 150, begun=True, held=100), wanted=5, wanted_for=n, free=0)
        for n in range(50)
    ]
    job = Job(200)
    job.manager.assignment.home |= {n: n for n in range(50)}
    answers = job.round(*debtors, *[report(capacity=300, free=60 + n) for n in range(150)])
    kept = [answer.keep for answer in answers]
    assert 250 <= sum(kept) <= 250 + 200
