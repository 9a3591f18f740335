"""The real command under mpirun: its answers are those of transformers, however the KV cache is
spread over ranks, and every row is answered once, whichever rank is killed when."""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from batch_job import COMMAND, BatchJob, Oracle, chat, completion, random_ids
from mpirun import mpirun, run_mpi

pytestmark = pytest.mark.skipif(mpirun() is None, reason="needs mpirun")

BLOCK = 16
KILLS = int(os.environ.get("HPC_DISTKV_KILLS", "4"))
MARK = "HPC_DISTKV_TEST_MARK"
"""Environment variable that tells the processes of one job from all others."""
RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


# Long rows with remote KV, against transformers


LONG_TOKENS = 480
"""Prompt and output of the longest row: on two ranks all of their memory."""


@pytest.fixture(scope="module")
def demo_rows(demo_model: Path) -> list[dict]:
    """One long row between short ones."""
    from transformers import AutoTokenizer

    story = " ".join(
        f"On day {day} the keeper counted {day * 37 % 101} ships, and {day * 17 % 29} birds."
        for day in range(1, 50)
    )
    long = AutoTokenizer.from_pretrained(demo_model)(story)["input_ids"][: LONG_TOKENS - 20]
    assert len(long) == LONG_TOKENS - 20
    return [
        completion("before", "The lighthouse stood on a", 12),
        chat("chat", "Name three colours.", 16),
        completion("long", long, 20, ignore_eos=True),
        completion("french", "The capital of France is", 8),
        completion("count", "1, 2, 3, 4, 5, 6,", 12),
        chat("greeting", "Say hello.", 10),
    ]


@pytest.fixture(scope="module")
def demo_answers(demo_model: Path, demo_rows: list[dict]) -> dict:
    return Oracle(demo_model).answers(demo_rows)


@pytest.mark.parametrize(("ranks", "blocks"), [(1, 40), (2, 15), (3, 11), (4, 9)])
def test_the_demo_model_answers_as_transformers_with_most_of_the_long_row_remote(
    ranks, blocks, tmp_path, demo_model, demo_rows, demo_answers
):
    job = BatchJob(tmp_path, demo_model, demo_rows)
    ran = job.run(ranks, "--num-blocks", blocks, "--temperature", 0)
    assert ran.returncode == 0, ran.stderr
    assert job.answers() == demo_answers
    remote = job.figures()["counters"]["peak_borrowed"] * BLOCK
    with_kv = LONG_TOKENS - 1  # the last token needs none
    assert remote > with_kv / 2 if ranks > 1 else remote == 0


@pytest.mark.parametrize(("ranks", "blocks", "seed"), [(2, 24, 0), (4, 8, 2)])
def test_a_wide_mix_is_answered_as_by_transformers(ranks, blocks, seed, tmp_path, tiny_model):
    rng = random.Random(seed)
    capacity = ranks * blocks * BLOCK
    rows = []
    for number in range(30):
        prompt = rng.choice([1, 5, 20, 20, 60, 130, capacity // 2, capacity - 50])
        ids, tokens = random_ids(prompt, rng), rng.randint(1, 40)
        rows.append(completion(f"row {number}", ids, tokens, ignore_eos=rng.random() < 0.5))
    job = BatchJob(tmp_path, tiny_model, rows)
    ran = job.run(ranks, "--num-blocks", blocks, "--temperature", 0)
    assert ran.returncode == 0, ran.stderr
    assert job.answers() == Oracle(tiny_model).answers(rows)
    assert job.figures()["counters"]["blocks_borrowed"] > 0


# One row as long as the cluster's memory


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 20), (3, 16)])
def test_one_row_may_need_the_memory_of_all_ranks(ranks, blocks, tmp_path, tiny_model):
    tokens = -(-95 * ranks * blocks * BLOCK // 100)
    assert tokens > (ranks - 1) * blocks * BLOCK
    prompt = random_ids(tokens - 12, random.Random(ranks))
    rows = [completion("whole", prompt, 12, ignore_eos=True)]
    job = BatchJob(tmp_path, tiny_model, rows)
    ran = job.run(ranks, "--num-blocks", blocks, "--temperature", 0)
    assert ran.returncode == 0, ran.stderr
    assert job.answers() == Oracle(tiny_model).answers(rows)
    remote = job.figures()["counters"]["peak_borrowed"]
    assert remote >= -(-(tokens - 1) // BLOCK) - blocks


def test_without_lending_the_same_row_is_an_error_with_the_arithmetic(tmp_path, tiny_model):
    prompt = random_ids(718, random.Random(3))
    rows = [completion("whole", prompt, 12), completion("short", prompt[:20], 4)]
    job = BatchJob(tmp_path, tiny_model, rows)
    ran = job.run(3, "--num-blocks", 16, "--temperature", 0, "--policy", "queue")
    assert ran.returncode == 1, ran.stderr
    lines = {line["custom_id"]: line for line in job.lines()}
    assert lines["short"]["error"] is None
    error = lines["whole"]["error"]
    assert error["code"] == "context_length_exceeded"
    numbers = [int(number) for number in re.findall(r"\d+", error["message"])]
    assert numbers == [730, 718, 12, 4096, 16 * BLOCK]
    assert job.figures()["counters"]["blocks_borrowed"] == 0


# Instances of several ranks


def test_instances_of_two_ranks_answer_as_transformers_with_loans_between_them(
    tmp_path, tiny_model
):
    rng = random.Random(4)
    prompts = [5, 40, 300, 20, 60, 250, 1, 30]
    rows = [
        completion(f"row {n}", random_ids(prompt, rng), rng.randint(1, 30), ignore_eos=n % 2 == 0)
        for n, prompt in enumerate(prompts)
    ]
    job = BatchJob(tmp_path, tiny_model, rows)
    instances = ("--tensor-parallel-size", 2, "--load-format", "broadcast")
    ran = job.run(4, "--num-blocks", 12, "--temperature", 0, *instances)
    assert ran.returncode == 0, ran.stderr
    assert "4 ranks in 2 instances of 2" in ran.stderr
    assert job.answers() == Oracle(tiny_model).answers(rows)
    assert job.figures()["counters"]["blocks_borrowed"] > 0


def test_a_tensor_parallel_size_that_cannot_be_is_refused_at_once(tmp_path, demo_model):
    job = BatchJob(tmp_path, demo_model, [completion("row", "Hello", 2)])
    ran = job.run(2, "--tensor-parallel-size", 2)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("Error:") == 1
    assert "9 query heads, 3 KV heads" in ran.stderr
    assert "sizes that do: 1, 3\n" in ran.stderr


# kill -9


def killable_rows() -> list[dict]:
    """Rows for some seconds of work, greedy and drawn."""
    rng = random.Random(11)
    rows = []
    for number in range(60):
        ids = random_ids(rng.choice([10, 30, 100, 500]), rng)
        fields = {"temperature": rng.choice([0, 0.8]), "ignore_eos": True}
        rows.append(completion(f"row {number}", ids, rng.randint(20, 120), **fields))
    return rows


def processes(mark: str) -> dict[psutil.Process, dict[str, str]]:
    """Running processes with that mark, and their environments."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = environment
    return found


def is_rank(environment: dict[str, str]) -> bool:
    """Launchers tell ranks, and nobody else, their number."""
    return any(name in environment for name in RANK_VARIABLES)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def run_and_kill(
    job: BatchJob, options: list, ranks: int, after_answers: bool, rng: random.Random
) -> bool:
    """Kill one rank some time after the start, or after this run's first answers; whether the job
    was still running then."""

    def size() -> int:
        return job.output.stat().st_size if job.output.exists() else 0

    before, mark = size(), uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_mpi, ranks, [COMMAND, *job.arguments(*options)], 90, {MARK: mark})
        if after_answers:
            wait_for(lambda: run.done() or size() > before, 60)
            time.sleep(rng.uniform(0, 1.5))
        else:
            time.sleep(rng.uniform(1, 5))
        victims = [process for process, known in processes(mark).items() if is_rank(known)]
        if len(victims) < ranks:
            assert run.result().returncode == 0, run.result().stderr
            return False
        rng.choice(victims).kill()
        assert wait_for(run.done, 60), "the job goes on without a rank"
        status = run.result().returncode
    if not status:  # killed on its way out
        return False
    assert wait_for(lambda: not processes(mark), 20), "a rank outlived its job"
    return True


def test_after_kills_of_any_rank_a_rerun_has_every_row_once_with_the_same_text(
    tmp_path, tiny_model
):
    rows, options, ranks = killable_rows(), ["--num-blocks", 24, "--max-num-seqs", 5], 3
    (tmp_path / "whole").mkdir()
    whole = BatchJob(tmp_path / "whole", tiny_model, rows)
    ran = whole.run(ranks, *options)
    assert ran.returncode == 0, ran.stderr

    job = BatchJob(tmp_path, tiny_model, rows)
    seed = int(os.environ.get("HPC_DISTKV_SEED", random.SystemRandom().randrange(10**6)))
    print(f"HPC_DISTKV_SEED={seed}", file=sys.stderr)
    rng = random.Random(seed)
    killed, rows_at_kills = 0, []
    for attempt in range(4 * KILLS):
        if run_and_kill(job, options, ranks, attempt % 3 < 2, rng):
            killed += 1
            rows_at_kills.append(job.output.read_bytes().count(b"\n") if job.output.exists() else 0)
        else:  # all rows were answered before the kill: begin again
            assert job.answers() == whole.answers()
            job.output.unlink()
        if killed == KILLS:
            break
    print(f"rows answered at the kills: {rows_at_kills}", file=sys.stderr)
    assert killed == KILLS
    assert any(0 < answered < len(rows) for answered in rows_at_kills)
    ran = job.run(ranks, *options)
    assert ran.returncode == 0, ran.stderr
    assert len(job.lines()) == len(rows)
    assert job.answers() == whole.answers()
