"""The project's job scripts under a real Slurm of two nodes: submitted, stopped by a signal and by
the time limit, requeued, gone on with, and in an array."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_job import COMMAND, BatchJob, answer, completion, random_ids
from mpirun import is_open_mpi, mpirun
from slurm_cluster import SlurmCluster, UnavailableError, install

pytestmark = pytest.mark.skipif(mpirun() is None, reason="needs an MPI")

SIZES = ("--dtype", "float32", "--block-size", "16", "--num-blocks", "100", "--threads", "1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    try:
        install(pmix=is_open_mpi())
    except UnavailableError as error:
        pytest.skip(str(error))
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(slurm: SlurmCluster, job: BatchJob, *options: str | int) -> str:
    """`hpc-distkv sbatch --submit`, for one core a rank; returns the id of the job."""
    files = ["--model", job.model, "-i", job.input, "-o", job.output]
    words = ["--cpus-per-task", 1, *options, *files, *SIZES, "--submit"]
    done = subprocess.run(
        [COMMAND, "sbatch", *map(str, words)],
        cwd=job.output.parent,
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def answering(slurm: SlurmCluster, job: BatchJob, *options: object) -> str:
    """The number of a job that has answered a row. On a busy machine Slurm 22.05's PMI-2 may read
    half of what a rank says, and end the job before it begins: then it is submitted once more."""

    def answered() -> bool:
        return job.output.exists() and job.output.stat().st_size > 0

    for _ in range(3):
        number = submit(slurm, job, *options)
        ended = ("FAILED", "CANCELLED")
        slurm.wait(lambda: answered() or slurm.job(number)["JobState"] in ended, 60, "an answer")  # noqa: B023
        if answered():
            return number
        assert "mpi/pmi2: invalid client request" in slurm.logs()
    raise AssertionError("Slurm's PMI-2 fails again and again")


def log(job: BatchJob, number: str) -> str:
    return (job.output.parent / f"hpc-distkv-{number}.log").read_text()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def endless_rows(count: int) -> list[dict]:
    """More work than there is time for."""
    rng = random.Random(3)
    return [
        completion(f"row {n}", random_ids(20, rng), 1500, ignore_eos=True, temperature=0.8)
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def limited(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> tuple[BatchJob, str]:
    """A job that Slurm asks to stop between 10 and 40 seconds after its start: it looks for time
    limits twice a minute. It runs while the other tests do, and cannot be requeued."""
    job = BatchJob(tmp_path_factory.mktemp("limited"), tiny_model, endless_rows(40))
    alone = ("--kind", "cpu", "--nodes", 1, "--tasks-per-node", 1)
    limits = ("--time", "1", "--grace", 0, "--sbatch-line", "--no-requeue")
    return job, submit(slurm, job, *alone, *limits, "--max-num-seqs", 2)


def test_a_job_on_two_nodes_is_stopped_requeued_and_goes_on(slurm, limited, tmp_path, tiny_model):
    rng = random.Random(1)
    rows = [
        completion(f"row {n}", random_ids(20, rng), 20 + 40 * (n % 6), ignore_eos=True)
        for n in range(24)
    ]
    job = BatchJob(tmp_path, tiny_model, rows)
    shape = ("--kind", "cpu", "--nodes", 2, "--tasks-per-node", 2)
    sampling = ("--grace", 0, "--max-num-seqs", 3, "--temperature", 0.7)
    number = answering(slurm, job, *shape, *sampling)
    slurm.run("scancel", "--signal=USR2", number)
    slurm.wait(lambda: slurm.job(number)["Restarts"] == "1", 30, "the requeue")
    kept = read(Path(f"{job.output}.unfinished.jsonl"))
    assert 0 < len(kept) < len(rows)
    known = slurm.wait_for_state(number, "COMPLETED", 90)
    assert known["ExitCode"] == "0:0"
    assert known["NodeList"] == "node[1-2]"
    said = log(job, number)
    assert "4 ranks" in said
    assert f"{len(kept)} rows with" in said
    assert "0: rows" in said, "every line says whose it is"
    (tmp_path / "whole").mkdir()
    whole = BatchJob(tmp_path / "whole", tiny_model, rows)
    ran = whole.run(0, *SIZES, "--temperature", 0.7, "--max-num-seqs", 24)
    assert ran.returncode == 0, ran.stderr
    assert job.answers() == whole.answers()


STOPPED_AS_IT_STARTS = """#!/bin/bash
[ "$SLURM_RESTART_COUNT" = 2 ] && exit 0
[ "$SLURM_RESTART_COUNT" = 1 ] && trap 'exit 75' TERM
touch "${0%/*}/started${SLURM_RESTART_COUNT:-0}"
while :; do sleep 0.1; done
"""
"""Stands for a `generate` that is preempted before it hears signals, then while the model loads,
and not when it starts once more."""


def test_a_job_that_is_preempted_while_it_starts_goes_back_into_the_queue(
    slurm, limited, tmp_path, tiny_model
):
    job = BatchJob(tmp_path, tiny_model, [])
    (tmp_path / "hpc-distkv").write_text(STOPPED_AS_IT_STARTS)
    (tmp_path / "hpc-distkv").chmod(0o755)
    alone = ("--kind", "cpu", "--nodes", 1, "--tasks-per-node", 1, "--no-activate")
    number = submit(slurm, job, *alone, "--line", f"export PATH={tmp_path}:$PATH", "-t", 60)
    for start in range(2):
        slurm.wait((tmp_path / f"started{start}").exists, 60, "the start")
        slurm.run("scancel", f"--signal={('USR2', 'TERM')[start]}", number)
        again = str(start + 1)
        slurm.wait(lambda again=again: slurm.job(number)["Restarts"] == again, 30, "the requeue")
    slurm.wait_for_state(number, "COMPLETED", 60)
    assert "nothing was answered" not in log(job, number)
    assert not list(tmp_path.glob("*.starts"))


def test_tasks_of_an_array_answer_shards_and_each_has_a_status(
    slurm, limited, tmp_path, tiny_model
):
    rows = [completion(f"row {n}", [7 + n, 9], 5) for n in range(12)]
    rows.append(completion("too long", [5], 10**6))
    job = BatchJob(tmp_path, tiny_model, rows)
    shape = ("--kind", "array", "--gpus-per-node", 0, "--tasks-per-node", 1, "--shards", 2)
    number = submit(slurm, job, *shape)
    tasks = [f"{number}_{task}" for task in (1, 2)]
    ended = ("COMPLETED", "FAILED")
    for task in tasks:
        slurm.wait(lambda task=task: slurm.job(task)["JobState"] in ended, 60, task)
    lines = {task: read(Path(f"{job.output}.{task}")) for task in (1, 2)}
    assert {len(found) > 0 for found in lines.values()} == {True}
    ids = [line["custom_id"] for found in lines.values() for line in found]
    assert sorted(ids) == sorted(row["custom_id"] for row in rows)
    for task, found in lines.items():
        failed = any(line["error"] for line in found)
        known = slurm.job(f"{number}_{task}")
        assert known["ExitCode"] == ("1:0" if failed else "0:0"), log(job, f"{number}_{task}")
    assert answer(next(line for line in lines[1] if not line["error"]))[1] > 0


def test_before_the_time_limit_a_job_stops_with_status_75_and_its_rows_put_aside(slurm, limited):
    job, number = limited
    known = slurm.wait_for_state(number, "FAILED", 70)
    assert known["TimeLimit"] == "00:01:00"
    assert known["ExitCode"] == "75:0"
    kept = read(Path(f"{job.output}.unfinished.jsonl"))
    assert kept
    assert f"{len(kept)} rows with" in log(job, number)
    assert "TIME LIMIT" not in log(job, number)
