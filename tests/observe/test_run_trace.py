"""Spans in bounded memory, and their file."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pytest
from local_ranks import open_local, run_local
from seen_runs import snapshot, two_ranks
from trace_format import check_schema

from hpc_distkv.comm.collective.clock import ClockOffset
from hpc_distkv.comm.world import World
from hpc_distkv.observe.summary.snapshot import Timeline
from hpc_distkv.observe.trace import spans as module
from hpc_distkv.observe.trace.spans import (
    FINE,
    FINE_EVERY,
    WINDOWS,
    Trace,
    begin_trace,
    gather_traces,
)
from hpc_distkv.observe.trace.trace_file import write_trace
from hpc_distkv.step.timesheet import Kind

HERE = ClockOffset(0.0, 0.0, 0.0)


def filled(most, times, kind=Kind.STEP, origin=0.0):
    trace = Trace(most, origin, HERE)
    for at in times:
        trace.span(kind, at, at + 0.001)
    return trace


def test_everything_is_kept_while_there_is_room():
    times = [n * 0.01 for n in range(1000)]
    trace = filled(1000, times)
    assert trace.stride == 1
    assert trace.spans["started"].tolist() == times


@pytest.mark.parametrize("seconds", [10, 100, 3000])
def test_a_long_run_leaves_whole_windows_evenly_over_all_of_it(seconds):
    times = np.arange(0, seconds, 0.01)
    trace = filled(500, times.tolist())
    assert len(trace.spans) <= 500
    windows = np.floor(trace.spans["started"] * WINDOWS).astype(int)
    kept = sorted(set(windows.tolist()))
    assert all(window % trace.stride == 0 for window in kept)
    last = int(times[-1] * WINDOWS)
    assert kept == list(range(0, last + 1, trace.stride))
    for window in kept[:-1]:
        expected = times[np.floor(times * WINDOWS) == window]
        assert trace.spans["started"][windows == window].tolist() == expected.tolist()


def test_ranks_with_different_load_keep_the_same_windows():
    """The one with more spans keeps a part of those of the other."""
    few = filled(400, np.arange(0, 100, 0.05).tolist())
    many = filled(400, np.arange(0, 100, 0.005).tolist())
    assert many.stride > few.stride
    windows = [set(np.floor(t.spans["started"] * WINDOWS).tolist()) for t in (few, many)]
    assert windows[1] <= windows[0]


def test_layers_are_kept_in_a_part_of_the_windows():
    times = np.arange(0, 20, 0.01).tolist()
    for kind in FINE:
        windows = np.floor(filled(10_000, times, kind).spans["started"] * WINDOWS)
        assert set((windows % FINE_EVERY).tolist()) == {0.0}


def test_one_window_with_more_spans_than_there_is_room_for_stays_bounded():
    trace = filled(100, np.arange(0, 0.1, 1e-4).tolist() + np.arange(10, 20, 0.5).tolist())
    assert len(trace.spans) == 100


def test_layers_follow_each_other():
    trace = Trace(100, 0.0, HERE)
    trace._masks = [0] * len(Kind)
    for layer in (0, 1, 2, -1, 0, -1):
        trace.layer(layer)
    spans = trace.spans
    assert spans["one"].tolist() == [0, 1, 2, 0]
    assert spans["ended"][:2].tolist() == spans["started"][1:3].tolist()


def test_all_ranks_arrive_on_the_clock_of_rank_0(monkeypatch):
    """Two ranks whose clocks differ by an hour and drift apart by a second note one moment."""

    def work(comm):
        rank = comm.world.rank
        monkeypatch.setattr(module.time, "perf_counter", lambda: 1000.0)
        trace = begin_trace(comm)
        ahead = 3600.0 * rank
        trace.clock = ClockOffset(1000.0 + ahead, ahead, 1e-5)
        trace.origin = 1000.0 + ahead
        # After 50 of 100 s the second clock is ahead by half of what it drifts.
        at = 1050.0 + ahead + 0.5 * rank
        trace.span(Kind.STEP, at, at + 1.0, 4, 9)
        later = ClockOffset(1100.0 + ahead + rank, ahead + rank, 2e-5)
        monkeypatch.setitem(clocks, rank, later)
        return gather_traces(comm, trace)

    clocks = {}
    monkeypatch.setattr(
        module,
        "measure_clock",
        lambda comm: clocks.get(comm.world.rank) or ClockOffset(0.0, 0.0, 0.0),
    )
    ranks, nothing = run_local(open_local(2, stall_timeout=20), work)
    assert nothing == []
    for rank in ranks:
        assert rank.spans["started"].tolist() == [pytest.approx(50.0, abs=0.01)]
    assert ranks[1].clock_error == 2e-5
    assert ranks[0].spans[["one", "other"]].tolist() == [(4, 9)]


@pytest.mark.parametrize("between_rounds", [0.01, 1.0])
def test_a_timeline_covers_the_run_evenly_in_bounded_memory(monkeypatch, between_rounds):
    timeline, taken = Timeline(instances=2000), 0
    for now in np.arange(0, 5000 * between_rounds, between_rounds).tolist():
        monkeypatch.setattr(module.time, "perf_counter", lambda now=now: now)
        if timeline.due:
            timeline.add(snapshot(now, [1], [0], []))
            taken += 1
    times = [s.at for s in timeline.snapshots]
    assert len(times) <= 100 < taken
    assert times[0] == 0
    gaps = np.diff(times)
    assert gaps.max() <= 2.5 * gaps.min()
    assert times[-1] >= now - gaps.max()


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_file_follows_the_trace_event_format(tmp_path, name):
    path = tmp_path / name
    world, ranks, timeline = two_ranks()
    write_trace(path, world, ranks, timeline, 0.0, {"model": "m"})
    data = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    content = json.loads(data)
    check_schema(content)
    assert content["otherData"]["model"] == "m"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("seed", range(10))
def test_nested_spans_stay_nested_in_the_file(tmp_path, seed):
    """Times a fraction of a nanosecond apart are rounded, but not out of each other."""
    rng = random.Random(seed)
    trace = Trace(1000, 0.0, HERE)
    trace._masks = [0] * len(Kind)

    def nest(start, end, depth):
        trace.span(Kind.STEP, start, end)
        if depth:
            cuts = sorted(rng.uniform(start, end) for _ in range(4))
            nest(cuts[0], cuts[1], depth - 1)
            nest(cuts[1], cuts[3], depth - 1)

    nest(1.0, 1.0 + 1e-7, 6)
    ranks = [module.RankSpans(trace.spans, 1, 0.0)]
    path = tmp_path / "trace.json"
    write_trace(path, World(0, (0,)), ranks, [], 0.0, {})
    check_schema(json.loads(path.read_text()))
