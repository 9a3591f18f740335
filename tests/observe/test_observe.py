"""Progress lines, latencies and the summary."""

from __future__ import annotations

import io
import json
import random
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from local_ranks import open_local
from prometheus_client.parser import text_string_to_metric_families
from seen_runs import snapshot

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import Result, pack_tokens
from hpc_distkv.observe.live import progress
from hpc_distkv.observe.live.leader import JobLeader
from hpc_distkv.observe.live.prometheus import PrometheusFile
from hpc_distkv.observe.live.watch import Watch
from hpc_distkv.observe.summary.metrics import Latencies, RankFigures, total, write_json
from hpc_distkv.observe.summary.run import RunRecord

NOW = snapshot(
    0.0,
    [30, 20],
    [0, 4],
    [(0, 1, 6)],
    answered=6,
    failed=1,
    left=7.0,
    prompt_tokens=np.array([300, 200]),
    generated_tokens=np.array([30, 20]),
)


def test_latencies_are_summed_up_by_percentile():
    rng = np.random.default_rng(1)
    seconds = rng.random(1001).astype("f4")
    latencies = Latencies()
    for value in seconds:
        latencies.add(float(value))
    summary = latencies.summary()
    for percent in (50, 90, 99):
        expected = np.percentile(seconds, percent, method="inverted_cdf")
        assert summary[f"p{percent}"] == pytest.approx(expected, abs=5e-5)
    assert summary["max"] == pytest.approx(seconds.max(), abs=1e-4)
    assert Latencies().summary() == {}


def test_counters_add_up_over_ranks():
    figures = total([Counters(steps=2, peak_borrowed=5), Counters(steps=3, peak_borrowed=9)])
    assert figures["steps"] == 5
    assert figures["peak_borrowed"] == 9


def test_the_summary_counts_output_tokens():
    record = RunRecord()
    record._started -= 10
    record.add([Result(0, pack_tokens([1, 2, 3]), "stop", 0.5, 2.0)])
    record.add([Result(1, pack_tokens([4]), "length", 1.5, 4.0)])
    summary = record.summary([Counters(prompt_tokens=10, generated_tokens=5)], [123])
    assert summary["output_tokens"] == 4
    assert summary["output_tokens_per_second"] == 0.5, "also of rows that go on"
    assert summary["time_to_first_token_s"]["mean"] == 1.0
    assert summary["latency_s"]["max"] == 4.0
    assert summary["peak_memory_bytes"] == [123]
    assert summary["counters"]["prompt_tokens"] == 10


def test_figures_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    (tmp_path / "link").symlink_to(path)
    write_json(tmp_path / "link", {"b": 2})
    assert (tmp_path / "link").is_symlink()
    assert json.loads(path.read_text()) == {"b": 2}
    assert {*tmp_path.iterdir()} == {path, tmp_path / "link"}


def test_a_log_gets_one_plain_line_per_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    report = progress.ProgressReport(stream)
    for _ in range(50):
        now[0] += 1.0
        report.show(NOW)
    report.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 50 // progress.LOG_INTERVAL
    stamp, _, said = lines[0].partition("  ")
    assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d:\d\d", stamp)
    assert said == (
        " 50%  7 of ≈ 14 rows, 1 errors; 4 requests running, 3 waiting; "
        "50 prompt + 5 output tokens/s; KV 25% used, 4 rBlocks lent; 0:00:10 left"
    )
    assert "0 prompt + 0 output" in lines[-1]  # rates are those of the last interval
    assert "\x1b" not in stream.getvalue()


def test_the_lines_of_a_long_log_become_rare(monkeypatch):
    now, at = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = progress.ProgressReport(io.StringIO())
    for second in range(12 * 3600):
        now[0] = float(second)
        if report.due:
            at.append(second)
            report.show(NOW)
    gaps = np.diff(at)
    assert (gaps[0], gaps[-1]) == (progress.LOG_INTERVAL, progress.LONGEST_LOG_INTERVAL)
    assert (np.diff(gaps) >= 0).all()
    assert len(at) < 1000


def test_what_is_only_set_aside_is_not_lent():
    """The log's number is one that the trace and the summary know: rBlocks with KV of others."""
    now = NOW._replace(debts=[(0, 1, 96)], hosted=np.array([0, 5]))
    stream = io.StringIO()
    report = progress.ProgressReport(stream)
    report._shown -= progress.LOG_INTERVAL
    report.show(now)
    assert ", 5 rBlocks lent" in stream.getvalue()


def test_errors_of_earlier_runs_are_errors_of_the_job():
    now = NOW._replace(failed=0, failed_before=3)
    assert now.errors == 3


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "BAR_INTERVAL", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    report = progress.ProgressReport(stream)
    report.show(NOW)
    report.close()
    assert "50%" in stream.getvalue()
    assert "7 of ≈ 14 rows" in stream.getvalue()
    assert "4 requests running, 3 waiting" in stream.getvalue()


def test_time_left_is_that_of_rows_like_those_that_ended():
    assert NOW.seconds_left(70.0) == 70.0
    assert NOW._replace(least_seconds=90.0).seconds_left(70.0) == 90.0  # a long row is under way
    assert snapshot(0.0, [1], [0], [], answered=0, before=5).seconds_left(70.0) is None
    assert snapshot(0.0, [1], [0], [], answered=0, before=5, left=15.0).fraction == 0.25
    assert snapshot(0.0, [1], [0], [], answered=0, left=0.0).fraction == 1.0


def test_the_slowest_rows_are_listed_by_name():
    record, times = RunRecord(), list(range(1, 31))
    random.Random(3).shuffle(times)
    for time in times:
        record.add([Result(time, pack_tokens([1]), "stop", 0.5, float(time))], f"row {time}", 7)
    slowest = record.summary([Counters()], [])["slowest_rows"]
    assert [row["custom_id"] for row in slowest] == [f"row {n}" for n in range(30, 10, -1)]
    assert {row["prompt_tokens"] for row in slowest} == {7}


def test_histograms_have_every_row_near_its_time():
    record, rng = RunRecord(), np.random.default_rng(2)
    times = rng.lognormal(0, 2, 500)
    for n, time in enumerate(times):
        record.add([Result(n, b"", "stop", 0.1, float(time))])
    bins = record.summary([Counters()], [])["histograms"]["latency_s"]
    assert sum(count for _, count in bins) == 500
    spread = np.repeat([time for time, _ in bins], [count for _, count in bins])
    assert np.abs(np.log(spread / np.sort(times))).max() < 0.05


def test_pools_are_remembered_at_their_fullest():
    manager = mock.MagicMock(running=0)
    manager.assignment.unfinished = 0
    engine = SimpleNamespace(comm=open_local(2)[0], gmanager=lambda source: manager)
    leader = JobLeader(engine, mock.MagicMock(), Watch())
    for used in ([3, 9], [5, 2], [4, 4]):
        manager.reports = SimpleNamespace(capacity=np.array([10, 10]), free=10 - np.array(used))
        leader.tick()
    ranks = [RankFigures(Counters(), 0, 1)] * 2
    manager.reports = None
    assert leader.close(ranks, engine.comm.world, False)["peak_kv_blocks"] == [5, 9]
    leader.release()


def samples(path):
    """Name and labels → value of a file for Prometheus, by its own parser."""
    families = text_string_to_metric_families(path.read_text())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_prometheus_reads_what_is_written(tmp_path):
    path = tmp_path / "run.prom"
    file = PrometheusFile(path, {"output": "/data/out.jsonl", "slurm_job_id": "7"})
    assert file.due
    file.write(NOW, [Counters(preemptions=2), Counters(preemptions=3, bytes_moved=10)])
    assert not file.due
    found = samples(path)
    run = (("output", "/data/out.jsonl"), ("slurm_job_id", "7"))
    assert found["hpc_distkv_rows_total", *run[:1], ("result", "failed"), run[1]] == 1
    assert found["hpc_distkv_preemptions_total", *run] == 5
    assert found["hpc_distkv_bytes_moved_total", *run] == 10
    assert found["hpc_distkv_progress_ratio", *run] == 0.5
    assert found["hpc_distkv_finished", *run] == 0
    for name, values in (
        ("kv_blocks_used", (30, 20)),
        ("kv_blocks_lent_now", (0, 4)),
        ("kv_blocks_set_aside_now", (0, 2)),
        ("kv_blocks_owed_now", (6, 0)),
        ("generated_tokens_total", (30, 20)),
    ):
        for instance, value in enumerate(values):
            assert found[f"hpc_distkv_{name}", ("instance", str(instance)), *run] == value
    file.write(NOW, [Counters()], finished=True)
    assert samples(path)["hpc_distkv_finished", *run] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_no_run_ends_because_its_state_cannot_be_written(tmp_path, caplog):
    watch = Watch(prometheus=PrometheusFile(tmp_path / "missing" / "run.prom", {}))
    watch._write(watch.prometheus, NOW, SimpleNamespace(counters=[Counters()]))
    assert "cannot write the file for Prometheus" in caplog.text
