"""A rank's time is divided without gaps and overlaps."""

from __future__ import annotations

import random

import pytest

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.step import timesheet
from hpc_distkv.step.timesheet import FIELDS, Kind, Recorder, TimeSheet


class Clock:
    """Advances only when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timesheet.time, "perf_counter", lambda: self.now)


class Spans(Recorder):
    def __init__(self):
        self.spans = []

    def span(self, kind, started, ended, one=0, other=0):
        self.spans.append((kind, started, ended, one, other))


def test_what_is_done_inside_a_wait_is_not_waiting(monkeypatch):
    clock, recorder = Clock(monkeypatch), Spans()
    sheet = TimeSheet(recorder)
    clock.now += 1
    sheet.enter(Kind.STEP)
    clock.now += 2
    sheet.enter(Kind.PARTIALS)
    clock.now += 4
    sheet.enter(Kind.SERVE)
    clock.now += 8
    sheet.leave(3, 7)
    clock.now += 16
    sheet.leave(5)
    clock.now += 32
    sheet.leave()
    counters = Counters()
    sheet.fill(counters)
    assert counters.compute_time == 2 + 32
    assert counters.partial_wait == 4 + 16
    assert counters.serve_time == 8
    assert counters.other_time == 1
    assert recorder.spans == [
        (Kind.SERVE, 107.0, 115.0, 3, 7),
        (Kind.PARTIALS, 103.0, 131.0, 5, 0),
        (Kind.STEP, 101.0, 163.0, 0, 0),
    ]


def test_a_turn_ends_one_kind_and_begins_another(monkeypatch):
    clock, recorder = Clock(monkeypatch), Spans()
    sheet = TimeSheet(recorder)
    sheet.enter(Kind.CONTROL)
    for kind in (Kind.CONTROL, Kind.QUERIES, Kind.QUERIES, Kind.CONTROL):
        sheet.turn(kind)
        clock.now += 1
    sheet.leave(9)
    assert sheet.spent(Kind.CONTROL) == sheet.spent(Kind.QUERIES) == 2
    assert [span[0] for span in recorder.spans] == [Kind.CONTROL, Kind.QUERIES, Kind.CONTROL]


@pytest.mark.parametrize("seed", range(20))
def test_all_kinds_together_are_the_time_that_passed(monkeypatch, seed):
    """Against a sheet that notes at every moment what goes on."""
    clock, rng = Clock(monkeypatch), random.Random(seed)
    sheet, stack = TimeSheet(Recorder()), [Kind.OTHER]
    expected = dict.fromkeys(FIELDS, 0.0)
    for _ in range(200):
        step = rng.randrange(1, 9) / 8
        clock.now += step
        expected[stack[-1]] += step
        if len(stack) > 1 and rng.random() < 0.5:
            stack.pop()
            sheet.leave()
        else:
            stack.append(rng.choice(list(FIELDS)))
            sheet.enter(stack[-1])
    counters = Counters()
    sheet.fill(counters)
    assert {kind: getattr(counters, field) for kind, field in FIELDS.items()} == expected
    assert sum(expected.values()) == clock.now - 100
