"""`generate` with the tiny model: statuses, reruns, figures, and the same answers from Python."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from batch_job import (
    BatchJob,
    Oracle,
    answer,
    chat,
    completion,
    random_ids,
    run_command,
    run_script,
)
from mpirun import mpirun
from safetensors.torch import load_file, save_file

from hpc_distkv.batch.results.claim import Claim

LAUNCHED = [0, pytest.param(2, marks=pytest.mark.skipif(mpirun() is None, reason="needs mpirun"))]
FOLDER = Path(__file__).parent


def some_rows(count: int = 12) -> list[dict]:
    rng = random.Random(5)
    rows = [completion(f"row {n}", random_ids(5 + 3 * n, rng), 10 + n) for n in range(count)]
    return [chat("chat", "Hello.", 9), *rows]


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> BatchJob:
    return BatchJob(tmp_path, tiny_model, some_rows())


@pytest.mark.parametrize("ranks", LAUNCHED)
def test_a_rerun_of_a_finished_job_changes_nothing_and_says_so(ranks, job):
    first = job.run(ranks, "--temperature", 0)
    assert first.returncode == 0, first.stderr
    assert "13 answered, 0 errors" in first.stdout
    before = job.output.read_bytes()
    again = job.run(ranks, "--temperature", 0)
    assert again.returncode == 0, again.stderr
    assert "13 answered (0 in this run), 0 errors (0 in this run)\n" in again.stdout
    assert job.output.read_bytes() == before


def test_results_of_another_job_are_refused_and_overwritten_on_request(job):
    greedy = job.run(0, "--temperature", 0)
    assert greedy.returncode == 0, greedy.stderr
    before = job.output.read_bytes()
    refused = job.run(0, "--temperature", 1)
    assert refused.returncode == 2
    assert "defaults.temperature was 0.0, now 1.0" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert job.output.read_bytes() == before
    overwritten = job.run(0, "--temperature", 1, "--overwrite")
    assert overwritten.returncode == 0, overwritten.stderr
    assert "13 answered, 0 errors\n" in overwritten.stdout
    assert len(job.answers()) == 13
    assert job.output.read_bytes() != before


@pytest.mark.parametrize("ranks", LAUNCHED)
def test_bad_rows_become_error_rows_and_status_1_also_in_a_rerun(ranks, tmp_path, tiny_model):
    rows = [
        completion("good", "once", 5),
        completion("too long", "once", 5000),
        completion("good", "twice", 5),
        {"custom_id": "no body"},
    ]
    job = BatchJob(tmp_path, tiny_model, rows)
    with job.input.open("a") as file:
        file.write("{nonsense\n")
    for said in ("1 answered, 4 errors\n", "1 answered (0 in this run), 4 errors (0 in this run)"):
        ran = job.run(ranks)
        assert ran.returncode == 1, ran.stderr
        assert said in ran.stdout
        assert "this run ends with status 1: all rows are done, and some are err" in ran.stderr
        assert "Traceback" not in ran.stderr
    lines = sorted(job.lines(), key=lambda line: line["id"])
    assert [line["id"] for line in lines] == [f"batch_req_{n}" for n in range(5)]
    assert [line["error"] is None for line in lines] == [True, False, False, False, False]
    assert lines[1]["error"]["code"] == "context_length_exceeded"
    assert lines[2]["error"]["code"] == "duplicate_custom_id"


def test_an_input_that_ends_within_a_line_is_a_fault_and_no_error_row(tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, [completion(name, "once", 5) for name in "abc"])
    whole = job.input.read_bytes()
    job.input.write_bytes(whole[:-9])
    torn = job.run(0)
    assert torn.returncode == 70, torn.stderr
    assert "ends within line 3: is it still being copied?" in torn.stderr
    assert "2 answered, 0 errors" in torn.stdout
    job.input.write_bytes(whole)
    again = job.run(0, "--ordered")
    assert again.returncode == 0, again.stderr
    assert [line["custom_id"] for line in job.lines()] == [*"abc"]


@pytest.mark.parametrize("ranks", LAUNCHED)
def test_a_full_disk_ends_the_job_with_a_message_and_status_70(ranks, tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, [completion(f"row {n}", [5], 9) for n in range(300)])
    ran = run_script(ranks, FOLDER / "full_disk.py", *job.arguments())
    assert ran.returncode == 70, ran.stderr
    assert "cannot write results to" in ran.stderr
    assert "Traceback" not in ran.stderr
    again = job.run(ranks)
    assert again.returncode == 0, again.stderr
    assert len(job.answers()) == 300


@pytest.mark.parametrize("ranks", LAUNCHED)
def test_a_row_for_which_the_model_computes_nan_is_an_error_row_and_spoils_no_other(
    ranks, tmp_path, tiny_model
):
    """Also not by what it leaves in the rBlocks that others get after it. The figures are those of
    the rows that have an answer."""
    good = ("whole", "chat", "twice")
    rows = [completion("whole", [8, 9, 10], 5), chat("chat", "Hello.", 9)]
    for number in range(6):
        rows.insert(number, completion(f"bad {number}", [9, 10 + number, 7] * 9, 5, logprobs=1))
    rows.append(completion("choices", [9, 7], 5, n=2))
    rows.append(completion("twice", [8, 9], 5, n=2))
    spoiled = shutil.copytree(tiny_model, tmp_path / "spoiled")
    weights = load_file(spoiled / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    job = BatchJob(tmp_path, spoiled, rows)
    ran = job.run(ranks, "--temperature", 0, "--num-blocks", 4, "--max-num-seqs", 1)
    assert ran.returncode == 1, ran.stderr
    assert "3 answered, 7 errors" in ran.stdout
    lines = {line["custom_id"]: line for line in job.lines()}
    for name, line in lines.items():
        if name not in good:
            assert line["response"]["status_code"] == 500
            assert "logits are not finite" in line["error"]["message"]
    single = good[:2]
    expected = Oracle(tiny_model).answers(row for row in rows if row["custom_id"] in single)
    assert {name: answer(lines[name]) for name in single} == expected
    figures = job.figures()
    usages = [lines[name]["response"]["body"]["usage"] for name in good]
    assert figures["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert figures["output_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    slowest = sorted(row["custom_id"] for row in figures["slowest_rows"])
    assert slowest == ["chat", "twice", "twice", "whole"]


@pytest.mark.parametrize("ranks", LAUNCHED)
def test_a_row_may_fill_all_memory_and_its_last_token_needs_none(ranks, tmp_path, tiny_model):
    prompt = random_ids(30, random.Random(1))
    room = 64 * max(ranks, 1)
    fitting = completion("fits", prompt, room + 1 - 30, ignore_eos=True)
    job = BatchJob(tmp_path, tiny_model, [fitting, completion("not", prompt, room + 2 - 30)])
    ran = job.run(ranks, "--temperature", 0, "--num-blocks", 4)
    assert ran.returncode == 1, ran.stderr
    fits, refused = sorted(job.lines(), key=lambda line: line["custom_id"])
    assert {"fits": answer(fits)} == Oracle(tiny_model).answers([fitting])
    assert f"the cluster's KV cache holds {room}" in refused["error"]["message"]


def test_what_cannot_be_written_is_said_before_the_model_is_looked_for(job):
    job.model, job.output = Path("/no/such/model"), Path("/proc/results.jsonl")
    ran = job.run(0)
    assert ran.returncode == 2, ran.stderr
    assert "cannot use /proc/results.jsonl for the results" in ran.stderr


def test_a_second_run_on_the_same_results_is_refused_before_it_loads_the_model(job):
    with Claim.take(job.output):
        job.model = Path("/no/such/model")
        ran = job.run(0)
    assert ran.returncode == 2, ran.stderr
    assert f"another run writes to {job.output}: process {os.getpid()} on " in ran.stderr
    assert not job.output.exists()


def test_errors_apart_results_in_order_and_errors_again(tmp_path, tiny_model, monkeypatch):
    """Also where the job was requeued before it could do so."""
    rows = [completion(f"row {n}", [5 + n, 7], 30 - 2 * n, ignore_eos=True) for n in range(9)]
    rows.insert(3, completion("bad", "once", 5000))
    job = BatchJob(tmp_path, tiny_model, rows)
    options = ("--error-file", tmp_path / "errors.jsonl", "--ordered", "--temperature", 0)
    ran = job.run(0, *options)
    assert ran.returncode == 1, ran.stderr
    assert [line["custom_id"] for line in job.lines()] == [f"row {n}" for n in range(9)]
    errors = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in errors] == ["bad"]
    rows[3] = completion("bad", "once", 5)
    job = BatchJob(tmp_path, tiny_model, rows)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ran = job.run(0, *options, "--retry-errors")
    assert ran.returncode == 0, ran.stderr
    assert [line["custom_id"] for line in job.lines()] == [row["custom_id"] for row in rows]
    assert (tmp_path / "errors.jsonl").read_text() == ""


def test_an_error_file_that_is_refused_leaves_all_files_as_they_are(tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, [completion("bad", "once", 5000)])
    assert job.run(0, "--error-file", tmp_path / "errors.jsonl").returncode == 1
    other = BatchJob(tmp_path / "other", tiny_model, [completion("bad", "once", 5000)])
    assert other.run(0).returncode == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    refused = job.run(0, "--error-file", other.output, "--retry-errors")
    assert refused.returncode == 2, refused.stderr
    assert f"give --error-file {tmp_path / 'errors.jsonl'}" in refused.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


def test_an_error_file_that_is_the_results_file_is_refused(job):
    ran = job.run(0, "--error-file", job.output)
    assert ran.returncode == 2, ran.stderr
    assert "both the results and the error file" in ran.stderr


def test_names_that_are_not_utf8_are_names(tmp_path, tiny_model):
    job = BatchJob(Path(os.fsdecode(bytes(tmp_path) + b"/\xff")), tiny_model, [])
    job.input.write_text(json.dumps(completion("a", "once", 4)) + "\n")
    job.output, job.metrics = (job.input.with_name(os.fsdecode(b"\xfe" + n)) for n in (b"o", b"m"))
    seeing = [f"--prometheus={job.output}.prom", f"--trace={job.output}.json"]
    for said in ("1 answered, 0 errors\n", "1 answered (0 in this run), 0 errors (0 in this run)"):
        ran = job.run(0, "--error-file", f"{job.output}.errors", *seeing)
        assert ran.returncode == 0, ran.stderr
        assert said in ran.stdout
    status = run_command(0, "status", job.output)
    assert (status.returncode, "left    0" in status.stdout) == (0, True), status.stderr
    page = run_command(0, "report", job.metrics, "-o", f"{job.output}.html")
    assert page.returncode == 0, page.stderr


def test_an_empty_file_is_a_finished_job(tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, [])
    ran = job.run(0)
    assert ran.returncode == 0, ran.stderr
    assert job.lines() == []


def test_metrics_agree_with_the_results(job):
    ran = job.run(0, "--temperature", 0)
    assert ran.returncode == 0, ran.stderr
    figures = job.figures()
    assert figures["rows"] == {
        "answered": 13,
        "failed": 0,
        "answered_before": 0,
        "failed_before": 0,
        "total": 13,
        "put_aside": 0,
    }
    usages = [line["response"]["body"]["usage"] for line in job.lines()]
    made = sum(usage["completion_tokens"] for usage in usages)
    read = sum(usage["prompt_tokens"] for usage in usages)
    assert figures["output_tokens"] == made
    assert figures["counters"]["prompt_tokens"] == read
    assert figures["counters"]["generated_tokens"] == made
    assert figures["counters"]["preemptions"] == 0
    assert figures["counters"]["blocks_lent"] == figures["counters"]["blocks_borrowed"] == 0
    generated = figures["counters"]["generated_tokens"]
    assert figures["output_tokens_per_second"] == pytest.approx(
        generated / figures["seconds"], 0.02
    )
    assert len(figures["peak_memory_bytes"]) == 1
    assert min(figures["peak_memory_bytes"]) > 10**7
    assert figures["latency_s"].keys() == figures["time_to_first_token_s"].keys()


@pytest.mark.parametrize("ranks", LAUNCHED)
def test_the_python_api_answers_in_order_like_the_command(ranks, tmp_path, job):
    answers = tmp_path / "answers.json"
    script = FOLDER / "spmd_generate.py"
    ran = run_script(ranks, script, job.model, job.input, answers)
    assert ran.returncode == 0, ran.stderr
    *found, again = json.loads(answers.read_text())
    asked = [json.loads(line) for line in job.input.read_text().splitlines()]
    assert [line["custom_id"] for line in found] == [row["custom_id"] for row in asked]
    assert answer(again) == answer(found[-1])
    assert job.run(0, "--temperature", 0).returncode == 0
    assert {line["custom_id"]: answer(line) for line in found} == job.answers()


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_a_failure_of_one_rank_ends_the_job_with_its_message(job):
    script = FOLDER / "failing_model.py"
    ran = run_script(2, script, *job.arguments("--temperature", 0), timeout=60)
    assert ran.returncode == 70, ran.stderr
    assert "[rank 1 on " in ran.stderr
    assert "the accelerator of this rank is lost" in ran.stderr


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_a_failure_of_one_rank_while_a_program_loads_ends_it(job):
    ran = run_script(2, FOLDER / "failing_model.py", job.model, timeout=60)
    assert ran.returncode == 70, ran.stderr
    assert "[rank 1 on " in ran.stderr
    assert "the accelerator of this rank is lost" in ran.stderr
