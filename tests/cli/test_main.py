"""Starting the command: help is instant, and what a user gets wrong is said once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from batch_job import COMMAND, BatchJob, completion, run_command
from mpirun import mpirun

HEAVY = {"torch", "transformers", "mpi4py", "mpi4py.MPI", "cupy", "scipy"}
FILES = ["generate", "--model", "m", "-i", "in", "-o", "out"]
LAUNCHED = [0, pytest.param(2, marks=pytest.mark.skipif(mpirun() is None, reason="needs mpirun"))]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["validate", "--help"],
        ["bench", "--help"],
        ["env", "--help"],
        ["report", "--help"],
        ["status", "--help"],
        ["sbatch", "--help"],
        ["simulate", "--help"],
    ],
    ids=" ".join,
)
def test_help_needs_neither_torch_nor_mpi(arguments):
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(sorted({HEAVY!r} & set(sys.modules))))\n"
        "from hpc_distkv.cli.main import main\n"
        f"sys.argv = ['hpc-distkv', *{arguments!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *shown, heavy = done.stdout.splitlines()
    assert "hpc-distkv" in shown[0] or "hpc_distkv" in shown[0]
    assert heavy == "[]"


def test_help_names_all_commands():
    done = run_command(0, "--help")
    for name in ("generate", "validate", "bench"):
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("ranks", LAUNCHED)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--no-such-option"], "No such option"),
        (["generate", "-i", "in", "-o", "out"], "Missing option '--model'"),
        ([*FILES, "--top-p", "0"], "--top-p"),
        ([*FILES, "--kv-memory", "much"], "4GiB"),
        ([*FILES, "--repetition-penalty", "nan"], "--repetition-penalty"),
        ([*FILES, "--top-p", "nan"], "nan is not a finite number"),
        ([*FILES, "--temperature", "nan"], "--temperature"),
        ([*FILES, "--stall-timeout", "nan"], "--stall-timeout"),
        ([*FILES, "--grace", "inf"], "--grace"),
        ([*FILES, "--gpu-memory-utilization", "nan"], "--gpu-memory-utilization"),
        ([*FILES, "--threads", "3000000000"], "--threads"),
        ([*FILES, "--seed", str(2**63)], "--seed"),
        (["no-such-command"], "No such command"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options_are_said_once_with_status_2(arguments, said, ranks):
    done = run_command(ranks, *arguments)
    assert done.returncode == 2
    assert done.stderr.count(said) == 1
    assert done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> BatchJob:
    return BatchJob(tmp_path, tiny_model, [completion("a", "once", 4)])


def remove_input(job: BatchJob) -> list:
    job.input.unlink()
    return []


def results_of_another_job(job: BatchJob) -> list:
    job.output.write_text('{"id": "batch_req_0", "custom_id": "a", "error": null}\n')
    meta = {"format": 1, "model": "another", "defaults": {"temperature": 0.0}}
    job.output.with_name(job.output.name + ".meta.json").write_text(json.dumps(meta))
    return ["--temperature", 1]


def broken_weights(job: BatchJob) -> list:
    copy = job.input.parent / "broken"
    copy.mkdir()
    for file in job.model.iterdir():
        os.symlink(file, copy / file.name)
    weights = copy / "model.safetensors"
    weights.unlink()
    weights.write_bytes((job.model / "model.safetensors").read_bytes()[:10_000])
    return ["--model", copy]


WRONG_JOBS = {
    "no model directory": (lambda job: ["--model", job.input.parent / "nothing"], "nothing"),
    "no input file": (remove_input, "cannot read"),
    "no output directory": (
        lambda job: ["-o", job.input.parent / "missing" / "out.jsonl"],
        "there is no directory",
    ),
    "output is a directory": (lambda job: ["-o", job.input.parent], "not a regular file"),
    "output is the input": (lambda job: ["-o", job.input], "both the input and the output"),
    "results of another job": (results_of_another_job, "--overwrite"),
    "no room for a block": (lambda job: ["--kv-memory", 4], "--kv-memory"),
    "no room for the pool": (lambda job: ["--num-blocks", 10**12], "--num-blocks"),
    "two sizes of the pool": (
        lambda job: ["--kv-memory", "1GiB", "--num-blocks", 8],
        "num_blocks and kv_memory say the same",
    ),
    "longer than the model was trained for": (
        lambda job: ["--max-model-len", 10**6],
        "--max-model-len 1000000",
    ),
    "a trace of another kind": (
        lambda job: ["--trace", job.input.parent / "trace.txt"],
        "it is written as .json or .json.gz",
    ),
    "torn weights": (broken_weights, "model.safetensors"),
    "no metrics directory": (
        lambda job: ["--metrics", job.input.parent / "missing" / "metrics.json"],
        "missing",
    ),
}


@pytest.mark.parametrize(
    ("ranks", "wrong"),
    [
        *((0, wrong) for wrong in WRONG_JOBS),
        *((2, wrong) for wrong in ("no model directory", "results of another job") if mpirun()),
    ],
)
def test_wrong_files_are_said_once_with_status_2(ranks, wrong, job):
    spoil, said = WRONG_JOBS[wrong]
    options = spoil(job)
    before = job.output.read_bytes() if job.output.exists() else None
    done = job.run(ranks, *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d  Error: ", line)
    assert said in line
    assert before == (job.output.read_bytes() if job.output.exists() else None)


def test_a_launcher_that_mpi_does_not_understand_is_no_row_that_failed(job, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    done = job.run(0)
    assert done.returncode == 2, done.stderr
    assert "launcher and library do not understand each other" in done.stderr


@pytest.mark.parametrize("command", ["validate", "merge", "generate"])
def test_what_is_logged_is_printable_and_says_when_whatever_the_command(command):
    script = (
        "import logging, sys\n"
        "from hpc_distkv.cli import group, main\n"
        "log = logging.getLogger('a')\n"
        "group.group.main = lambda **_: log.warning('\\x1b[2J')\n"
        f"sys.argv = ['hpc-distkv', {command!r}]\n"
        "main.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"[\d-]{5} [\d:]{8}  WARNING a: \\x1b\[2J\n", done.stderr), done.stderr


def test_a_fault_leaves_with_status_70_and_a_traceback(tmp_path):
    script = (
        "import sys\n"
        "from hpc_distkv.cli import main, status\n"
        "status.read_statuses = lambda *files: 1 // 0\n"
        "sys.argv = ['hpc-distkv', 'status', 'results.jsonl']\n"
        "main.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 70, done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_the_script_is_installed():
    assert Path(COMMAND).exists()
