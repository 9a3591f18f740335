"""Progress lines, latencies and the summary."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from hpc_distkv.control.messages import Counters, Result, pack_tokens
from hpc_distkv.observe import progress
from hpc_distkv.observe.latency import Latencies
from hpc_distkv.observe.metrics import total, write_json
from hpc_distkv.observe.run import RunRecord

STATE = progress.State(fraction=0.5, rows=7, failed=1, running=3, tokens=900, used=0.25, lent=4)


def test_latencies_are_summed_up_by_percentile():
    rng = np.random.default_rng(1)
    seconds = rng.random(1001).astype("f4")
    latencies = Latencies()
    for value in seconds:
        latencies.add(float(value))
    summary = latencies.summary()
    for percent in (50, 90, 99):
        assert summary[f"p{percent}"] == pytest.approx(np.percentile(seconds, percent), abs=1e-4)
    assert summary["max"] == pytest.approx(seconds.max(), abs=1e-4)
    assert Latencies().summary() == {}


def test_counters_add_up_over_ranks():
    figures = total([Counters(steps=2, peak_borrowed=5), Counters(steps=3, peak_borrowed=9)])
    assert figures["steps"] == 5
    assert figures["peak_borrowed"] == 9


def test_the_summary_counts_output_tokens():
    record = RunRecord()
    record.add(Result(0, pack_tokens([1, 2, 3]), "stop", 0.5, 2.0))
    record.add(Result(1, pack_tokens([4]), "length", 1.5, 4.0))
    summary = record.summary([Counters(prompt_tokens=10, generated_tokens=5)], [123])
    assert summary["output_tokens"] == 4
    assert summary["time_to_first_token_s"]["mean"] == 1.0
    assert summary["latency_s"]["max"] == 4.0
    assert summary["peak_memory_bytes"] == [123]
    assert summary["counters"]["prompt_tokens"] == 10


def test_figures_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_gets_one_plain_line_per_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    report = progress.ProgressReport(stream)
    for _ in range(50):
        now[0] += 1.0
        report.show(STATE)
    report.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 50 // progress.LOG_INTERVAL
    assert "7 rows (1 errors), 3 running, 90 tokens/s" in lines[0]
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "BAR_INTERVAL", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    report = progress.ProgressReport(stream)
    report.show(STATE)
    report.close()
    assert "50%" in stream.getvalue()
    assert "7 rows" in stream.getvalue()
