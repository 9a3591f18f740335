"""Metrics and traces of all runs of a job are kept, and put together."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_report import write_run

from hpc_distkv.cli.group import group
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.percentiles import PERCENTILES
from hpc_distkv.control.messages.requests import Result, pack_tokens
from hpc_distkv.observe.report.page import page
from hpc_distkv.observe.summary.earlier import keep_earlier, numbered, read_about, write_anew
from hpc_distkv.observe.summary.legs import merged
from hpc_distkv.observe.summary.metrics import total, write_json
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.observe.summary.run_files import RunFileError, read_run


def about(hour: int, output: str = "/out", **more: object) -> dict:
    """What a run is that began at this hour."""
    when = f"2026-12-01T{hour:02}:00:00+00:00"
    return {"output": output, "input": "/in", "started": when, "resumed": hour > 1} | more


def run(folder: Path, hour: int, **more: object) -> None:
    """A run that writes its metrics at its end."""
    path, is_now = folder / "metrics.json", about(hour, **more)
    keep_earlier(path, is_now)
    write_json(path, {"job": is_now})


def kept(folder: Path) -> dict[str, str]:
    return {path.name: read_about(path)["started"][11:13] for path in folder.iterdir()}


def test_every_run_of_a_job_keeps_its_figures_and_the_last_has_the_plain_name(tmp_path):
    for hour in (1, 2, 3):
        run(tmp_path, hour)
    assert kept(tmp_path) == {"metrics.1.json": "01", "metrics.2.json": "02", "metrics.json": "03"}


def test_a_job_that_starts_anew_takes_the_place_of_its_earlier_runs_alone(tmp_path):
    run(tmp_path, 1)
    run(tmp_path, 2)
    write_json(tmp_path / "metrics.2.json", {"job": about(3, "/another")})
    run(tmp_path, 5, resumed=False)
    assert kept(tmp_path) == {"metrics.2.json": "03", "metrics.json": "05"}


def test_what_another_job_wrote_there_is_no_earlier_run(tmp_path):
    run(tmp_path, 1, output="/another")
    run(tmp_path, 2)
    assert kept(tmp_path) == {"metrics.json": "02"}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz", "trace.big.json"])
def test_a_trace_says_whose_it_is_and_gets_a_name_that_is_read(name, tmp_path):
    write_run(tmp_path, **about(1))
    content = (tmp_path / "trace.json").read_bytes()
    (tmp_path / "trace.json").unlink()
    path = tmp_path / name
    if name.endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)
    assert read_about(path)["started"] == about(1)["started"]
    keep_earlier(path, about(2))
    assert not path.exists()
    stem, _, suffix = name.partition(".json")
    assert numbered(path, 1) == tmp_path / f"{stem}.1.json{suffix}"
    assert read_run([numbered(path, 1)]).history is not None


def damaged(content: bytes) -> bytes:
    """Compressed, with bytes in its middle that no compressor writes."""
    packed = gzip.compress(content, mtime=0)
    return packed[:10] + b"\xff" * 20 + packed[30:]


@pytest.mark.parametrize(
    "spoil",
    [damaged, lambda content: gzip.compress(content)[:40], lambda content: content, lambda _: b""],
    ids=["damaged", "cut off", "not compressed", "empty"],
)
def test_a_damaged_file_of_an_earlier_run_is_replaced(spoil, tmp_path, caplog):
    content = json.dumps({"job": about(1)}).encode()
    path = tmp_path / "metrics.json.gz"
    path.write_bytes(spoil(content))
    write_anew(path, about(2), "metrics", lambda path: path.write_bytes(b"new"))
    assert caplog.text == ""
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("error", [OSError("the disk is full"), MemoryError("no more"), KeyError()])
def test_no_finished_run_ends_because_its_figures_cannot_be_written(error, tmp_path, caplog):
    def fail(_: Path) -> None:
        raise error

    write_anew(tmp_path / "metrics.json", about(1), "metrics", fail)
    assert f"cannot write the metrics {tmp_path}/metrics.json: {error}" in caplog.text


def test_figures_of_legs_are_those_of_one_long_run():
    """But for percentiles, which are those of bins."""
    rng, whole, legs = np.random.default_rng(5), RunRecord(), []
    counted = []
    for size in (300, 500):
        record = RunRecord()
        for n, seconds in enumerate(rng.lognormal(0, 2, size)):
            result = Result(n, pack_tokens([1, 2]), "stop", float(seconds / 3), float(seconds))
            for each in (record, whole):
                each.add([result], f"row {n} of {size}", 7)
        record._started -= size
        counters = Counters(generated_tokens=9 * size, prompt_tokens=size, peak_borrowed=size)
        counters.gaps = {int(at): 5 for at in rng.integers(-90, -40, 30)}
        counted.append(counters)
        numbers = {name: n for name, n in total([counters]).items() if name != "gaps"}
        ranks = [{"rank": 0, "counters": numbers}]
        requests = {"total": 800, "completed": size, "failed": 0}
        summary = record.summary([counters], [])
        legs.append(summary | {"request_counts": requests, "job": about(1), "ranks": ranks})
    whole._started -= 800
    expected, found = whole.summary(counted, []), merged(legs)
    for name in ("seconds", "prompt_tokens", "output_tokens", "output_tokens_per_second"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["tokens_per_second"] == pytest.approx(expected["tokens_per_second"], rel=1e-3)
    assert found["request_counts"] == {"total": 800, "completed": 500, "failed": 0}
    assert found["counters"]["peak_borrowed"] == 500
    assert found["histograms"] == expected["histograms"]
    assert found["slowest_rows"] == expected["slowest_rows"]
    for name in ("latency_s", "time_to_first_token_s"):
        for percentile in (*(f"p{p}" for p in PERCENTILES), "mean", "max"):
            exact = percentile in ("mean", "max")
            close = pytest.approx(expected[name][percentile], rel=1e-3 if exact else 0.03)
            assert found[name][percentile] == close
    assert found["between_tokens_s"]["p90"] == expected["between_tokens_s"]["p90"]


def test_the_error_of_predictions_is_the_mean_of_those_that_predicted(tmp_path):
    errors = [0.0, 0.2, 0.0, 0.4]
    for hour, error in enumerate(errors, start=1):
        path = write_run(tmp_path, number=f".{hour}", **about(hour)) / f"metrics.{hour}.json"
        figures = json.loads(path.read_text())
        for counters in (figures["counters"], *(rank["counters"] for rank in figures["ranks"])):
            counters["prediction_error"] = error
        write_json(path, figures)
    found = read_run([tmp_path]).metrics
    of_ranks = total([Counters(prediction_error=error) for error in errors])["prediction_error"]
    assert of_ranks == pytest.approx(0.3)
    assert found["counters"]["prediction_error"] == of_ranks
    assert [rank["counters"]["prediction_error"] for rank in found["ranks"]] == [of_ranks] * 2


def test_a_page_of_several_runs_has_a_line_for_each_and_the_last_trace(tmp_path):
    for hour, number in ((1, ".1"), (2, ".2"), (3, "")):
        write_run(tmp_path, number=number, **about(hour))
    html = page(read_run([tmp_path]))
    table = html.partition("<h2>3 runs</h2>")[2].partition("</table>")[0]
    assert re.findall(r"2026-12-01 \d\d", table) == [f"2026-12-01 {h:02}" for h in (1, 2, 3)]
    assert "Throughput of the run of 2026-12-01 03:00:00 UTC" in html
    rows = html.partition("<span>rows answered</span>")[2]
    assert rows.startswith("<b>32</b>"), "the last run's count has those before in it"


def test_shards_of_an_array_add_up(tmp_path):
    for index in (1, 2):
        more = {"shard": f"{index}/2", "resumed": False}
        write_run(tmp_path, number=f".{index}", **about(1, f"/out.{index}", **more))
    run = read_run([tmp_path])
    assert run.metrics["request_counts"] == {"total": 66, "completed": 64, "failed": 2}
    assert "shard 2/2" in page(run)


def test_runs_of_other_jobs_are_refused_and_those_that_were_dropped_left_out(tmp_path):
    write_run(tmp_path, **about(2))
    write_run(tmp_path, number=".1", **about(1, "/another"))
    with pytest.raises(RunFileError, match="of another job"):
        read_run([tmp_path])
    write_run(tmp_path, number=".1", **about(1))
    write_run(tmp_path, **about(2, resumed=False))
    run = read_run([tmp_path])
    assert run.names == ["metrics.json", "trace.json"]
    output = tmp_path / "page.html"
    ran = CliRunner().invoke(group, ["report", str(tmp_path), "-o", str(output)])
    assert "left out  metrics.1.json, trace.1.json" in ran.output
    assert "1 runs" not in output.read_text()


def test_one_run_is_not_counted_twice(tmp_path):
    write_run(tmp_path, **about(1))
    copy = tmp_path / "copy.json"
    copy.write_text((tmp_path / "metrics.json").read_text())
    with pytest.raises(RunFileError, match="second file of metrics of one run"):
        read_run([tmp_path])


def test_files_of_the_version_before_are_read(tmp_path):
    write_run(tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    figures["job"] = {"model": "m", "input": "in", "output": "out"}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    assert "<svg" in page(read_run([tmp_path]))
