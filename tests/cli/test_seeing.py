"""What a job shows of itself: its metrics, its trace and its Prometheus file agree."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest
from batch_job import BatchJob, completion, random_ids, run_command
from mpirun import mpirun
from prometheus_client.parser import text_string_to_metric_families
from trace_format import check_schema

from hpc_distkv.step.timesheet import FIELDS

pytestmark = pytest.mark.skipif(mpirun() is None, reason="needs mpirun")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> BatchJob:
    """A finished job on two ranks whose longest row needs both pools."""
    rng, folder = random.Random(3), tmp_path_factory.mktemp("seen")
    rows = [completion(f"row {n}", random_ids(20 + n, rng), 12) for n in range(10)]
    rows.append(completion("long", random_ids(400, rng), 12, ignore_eos=True))
    rows.append({"custom_id": "no body"})
    job = BatchJob(folder, tiny_model, rows)
    seeing = ["--prometheus", folder / "run.prom", "--trace", folder / "trace.json"]
    ran = job.run(2, "--num-blocks", 20, "--temperature", 0, *map(str, seeing))
    assert ran.returncode == 1, ran.stderr
    (folder / "log").write_text(ran.stderr + ran.stdout)
    return job


def test_the_log_tells_when_what_happened_and_its_numbers_are_those_of_the_metrics(job, figures):
    log = (job.input.parent / "log").read_text()
    header, *lines = log.splitlines()
    assert re.match(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+  hpc-distkv \S+; 2 ranks on one node", header
    )
    summary = {line.split()[0]: line for line in lines if not re.match(r"\d\d-\d\d ", line)}
    assert summary.keys() == {"rows", "time", "memory", "results"}
    for said in (
        "no row was done before",
        "all 12 rows of the input are read",
        "this run ends with status 1: all rows are done, and some are errors",
    ):
        assert sum(said in line for line in lines) == 1
    counters = figures["counters"]
    assert summary["rows"].endswith("11 answered, 1 errors")
    assert f"{counters['blocks_borrowed']} rBlocks lent" in summary["memory"]
    rate = float(summary["time"].split()[3])
    assert rate == pytest.approx(counters["generated_tokens"] / figures["seconds"], rel=0.02)


@pytest.fixture(scope="module")
def figures(job) -> dict:
    return job.figures()


@pytest.fixture(scope="module")
def trace(job) -> dict:
    return json.loads((job.input.parent / "trace.json").read_text())


@pytest.fixture(scope="module")
def spans(trace) -> dict:
    """Rank → category → spans."""
    found = defaultdict(lambda: defaultdict(list))
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"] - 1][event["cat"]].append(event)
    return found


def counter(trace, name, rank) -> list[dict]:
    return [
        event["args"]
        for event in trace["traceEvents"]
        if event["ph"] == "C" and event["name"] == name and event["pid"] == rank + 1
    ]


def test_requests_are_counted(job, figures):
    assert figures["request_counts"] == {"total": 12, "completed": 11, "failed": 1}
    usages = [line["response"]["body"]["usage"] for line in job.lines() if line["error"] is None]
    assert figures["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert figures["output_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    assert {row["custom_id"] for row in figures["slowest_rows"]} == {
        line["custom_id"] for line in job.lines() if line["error"] is None
    }


def test_every_second_of_a_rank_counts_once(figures, spans):
    """All times together are no less than what the trace shows, and no more than the run."""
    for rank in figures["ranks"]:
        times = [rank["counters"][field] for field in FIELDS.values()]
        assert min(times) >= 0
        mine = [event for events in spans[rank["rank"]].values() for event in events]
        first, last = min(e["ts"] for e in mine), max(e["ts"] + e["dur"] for e in mine)
        assert 1e-6 * (last - first) - 1e-3 <= sum(times) <= figures["seconds"] + 1e-3
    ranks = figures["ranks"]
    for name, value in figures["counters"].items():
        if name not in ("peak_borrowed", "prediction_error"):
            assert value == pytest.approx(sum(r["counters"][name] for r in ranks), abs=1e-3)


def test_loans_are_in_the_metrics(figures):
    counters = figures["counters"]
    assert counters["blocks_lent"] == counters["blocks_borrowed"] > 0
    assert counters["bytes_moved"] > 0
    assert counters["refused_grants"] == 0
    assert all(0 < peak <= 20 for peak in figures["peak_kv_blocks"])


def test_the_trace_is_what_perfetto_reads(trace):
    check_schema(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert [name.split(" on ")[0] for name in names] == ["rank 0", "rank 1"]


def test_the_spans_of_the_trace_add_up_to_the_metrics(trace, spans, figures):
    assert trace["otherData"]["one_window_kept_of"] == [1, 1]
    for rank in figures["ranks"]:
        mine, counters = spans[rank["rank"]], rank["counters"]
        assert len(mine["step"]) == counters["steps"]
        tokens = sum(step["args"]["tokens"] for step in mine["step"])
        decoded = tokens - counters["prompt_tokens"]
        assert 0 <= decoded <= counters["generated_tokens"]
        in_steps = 1e-6 * sum(e["dur"] for e in mine["step"])
        assert counters["compute_time"] - 1e-3 <= in_steps <= counters["step_time"] + 1e-3
        assert 1e-6 * sum(e["dur"] for e in mine["lead"]) == pytest.approx(
            counters["lead_time"], abs=2e-4
        )
        moved = sum(e["args"]["rBlocks"] for e in mine["transfer"])
        assert moved == counters["blocks_borrowed"] + counters["blocks_returned"]


def test_a_creditor_is_seen_serving_within_the_step_of_its_debtor(spans, trace):
    """Whoever serves does it between the begin of a debtor's step and its end, by one clock."""
    error = sum(trace["otherData"]["clock_error_us"]) + 1
    served = [(rank, e) for rank in (0, 1) for e in spans[rank]["visit"] if e["args"]["query rows"]]
    assert served
    for rank, visit in served:
        steps = spans[1 - rank]["step"]
        middle = visit["ts"] + visit["dur"] / 2
        assert any(
            s["ts"] - error <= middle <= s["ts"] + s["dur"] + visit["dur"] + error for s in steps
        )


def test_the_counters_of_the_trace_end_with_the_metrics(trace, figures):
    for rank in figures["ranks"]:
        last = counter(trace, "tokens", rank["rank"])[-1]
        assert last["prompt"] == rank["counters"]["prompt_tokens"]
        assert last["generated"] == rank["counters"]["generated_tokens"]
        pools = counter(trace, "KV pool (rBlocks)", rank["rank"])
        assert all(sum(pool.values()) == 20 and min(pool.values()) >= 0 for pool in pools)
        assert pools[-1]["own"] == 0


def test_the_file_for_prometheus_has_the_end_of_the_run(job, figures):
    families = text_string_to_metric_families((job.input.parent / "run.prom").read_text())
    samples = [sample for family in families for sample in family.samples]
    found = {(s.name, s.labels.get("result", s.labels.get("instance"))): s.value for s in samples}
    assert found["hpc_distkv_finished", None] == 1
    assert found["hpc_distkv_rows_total", "answered"] == 11
    assert found["hpc_distkv_rows_total", "failed"] == 1
    generated = sum(found["hpc_distkv_generated_tokens_total", str(i)] for i in range(2))
    assert generated == figures["counters"]["generated_tokens"]
    assert {s.labels["output"] for s in samples} == {str(job.output)}


def test_the_report_of_a_job_is_drawn_from_its_folder(job, tmp_path):
    page = tmp_path / "report.html"
    done = run_command(0, "report", job.input.parent, "-o", page)
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    assert "Slowest rows" in html
    assert "long" in html
    assert "missing" not in html.partition("<body>")[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prometheus", "run.txt"], "*.prom"),
        (["--trace", "OUTPUT"], "give another file"),
        (["--metrics", "MODEL"], "in the model's directory"),
        (["--metrics", "/dev/null"], "not a regular file"),
        (["--trace", "/dev/stdout"], "not a regular file"),
    ],
)
def test_files_that_cannot_be_are_refused_before_the_model_is_loaded(
    tmp_path, tiny_model, options, said
):
    job = BatchJob(tmp_path, tiny_model, [])
    kept = tmp_path / "model" / "config.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    job.model = kept.parent
    names = {"OUTPUT": job.output, "MODEL": kept}
    given = [str(names.get(o, tmp_path / o)) if n else o for n, o in enumerate(options)]
    done = job.run(0, *given)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert kept.read_text() == "{}"
    assert not Path("/dev/null").is_file()


def test_a_report_does_not_take_the_place_of_what_it_is_drawn_from(job):
    before = job.metrics.read_bytes()
    for run in (job.metrics, job.metrics.parent):
        done = run_command(0, "report", run, "-o", job.metrics)
        assert done.returncode == 2
        assert "is a file of the run" in done.stderr
    assert job.metrics.read_bytes() == before
