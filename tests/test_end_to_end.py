"""The real command under mpirun: its answers are those of transformers, however the KV cache is
spread over ranks, and every row is answered once, however the job is interrupted."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
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

from hpc_distkv.observe.summary.run_files import read_run

pytestmark = pytest.mark.skipif(mpirun() is None, reason="needs mpirun")

BLOCK = 16
STALL = 5
ROWS = int(os.environ.get("HPC_DISTKV_ROWS", "40"))
INTERRUPTIONS = int(os.environ.get("HPC_DISTKV_INTERRUPTIONS", "3"))
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


@pytest.mark.xdist_group("demo answers")  # which take long to make
@pytest.mark.parametrize(("ranks", "blocks"), [(1, 40), (2, 15), (4, 9)])
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


@pytest.mark.xdist_group("demo answers")
def test_a_row_larger_than_all_pools_is_answered_from_files(
    tmp_path, demo_model, demo_rows, demo_answers
):
    """An rBlock takes 720 KiB: a rank's file has room for 16, and is gone with the rank."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    job = BatchJob(tmp_path, demo_model, demo_rows)
    files = ("--host-kv-path", folder, "--host-kv-memory", "11.5MiB")
    ran = job.run(2, "--num-blocks", 8, "--temperature", 0, *files)
    assert ran.returncode == 0, ran.stderr
    assert job.answers() == demo_answers
    assert job.figures()["counters"]["peak_host"] >= LONG_TOKENS // BLOCK - 2 * 8
    assert "rBlocks to its memory" in ran.stdout
    assert list(folder.iterdir()) == []


def test_a_file_that_cannot_be_made_ends_the_job_with_the_reason(tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, [completion("a", [5], 3)])
    files = ("--host-kv-path", tmp_path, "--host-kv-memory", "1000000TiB")
    refused = job.run(2, "--num-blocks", 8, *files)
    assert refused.returncode == 2
    assert f"--host-kv-path {tmp_path}: no file of" in refused.stderr
    assert list(tmp_path.glob("*kv*")) == []


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


# Interruptions: kill -9 of one rank, and signals that ask the job to stop


def long_rows(count: int) -> list[dict]:
    """Rows for some seconds of work, greedy and drawn."""
    rng = random.Random(11)
    rows = []
    for number in range(count):
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


def ranks_of(mark: str) -> dict[int, psutil.Process]:
    """The ranks among them by number: launchers tell ranks, and nobody else, their number."""
    return {
        int(environment[name]): process
        for process, environment in processes(mark).items()
        for name in RANK_VARIABLES
        if name in environment
    }


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


class Launched:
    """A job that runs in the background, and may be interrupted."""

    def __init__(self, job: BatchJob, ranks: int, *options: str | int) -> None:
        self.mark = uuid.uuid4().hex
        self._job = job
        self._before = self._size()
        self._pool = ThreadPoolExecutor(1)
        words = [COMMAND, *job.arguments(*options)]
        self._run = self._pool.submit(run_mpi, ranks, words, 300, {MARK: self.mark})

    def wait_for_answers(self) -> None:
        """Until this run has written some, or has ended."""
        assert wait_for(lambda: self._run.done() or self._size() > self._before, 180)

    def wait_for_a_step(self) -> None:
        """Until all ranks have most likely begun to compute."""
        assert wait_for(lambda: self._run.done() or self._job.output.exists(), 180)
        time.sleep(0.7)

    def ranks(self) -> dict[int, psutil.Process]:
        return ranks_of(self.mark)

    def end(self, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        """How it ended; nothing of it is left."""
        assert wait_for(self._run.done, seconds), "the job goes on"
        assert wait_for(lambda: not processes(self.mark), 20), "a process outlived its job"
        self._pool.shutdown()
        return self._run.result()

    def _size(self) -> int:
        return self._job.output.stat().st_size if self._job.output.exists() else 0


def interrupt(job: BatchJob, options: list, ranks: int, way: int, rng: random.Random) -> bool:
    """Send a signal to one rank, or one that asks to stop to all of them, some time after the
    start or after this run's first answers; whether the job was still running then."""
    run = Launched(job, ranks, *options)
    if rng.random() < 0.7:
        run.wait_for_answers()
        time.sleep(rng.uniform(0, 1.0))
    else:
        time.sleep(rng.uniform(1, 4))
    victims = run.ranks()
    if len(victims) < ranks:
        ran = run.end()
        assert ran.returncode == 0, ran.stderr
        return False
    everybody = way != signal.SIGKILL and rng.random() < 0.5
    for rank in victims if everybody else [rng.randrange(ranks)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victims[rank].send_signal(way)
    ran = run.end()
    if way != signal.SIGKILL:
        # Before the command listens, a signal ends the process, as the launcher says.
        said = ran.stdout + ran.stderr
        assert ran.returncode in (0, 75, 128 + way, -way) or f"signal {way:d}" in said, said
        print(f"{signal.Signals(way).name}: status {ran.returncode}", file=sys.stderr)
    return ran.returncode != 0


def test_after_any_interruptions_every_row_is_there_once_with_the_same_text(tmp_path, tiny_model):
    rows, ranks = long_rows(ROWS), 3
    options = ["--num-blocks", 24, "--max-num-seqs", 5, "--grace", 0.3]
    whole = BatchJob(tmp_path / "whole", tiny_model, rows)
    ran = whole.run(ranks, *options, timeout=300)
    assert ran.returncode == 0, ran.stderr

    job = BatchJob(tmp_path, tiny_model, rows)
    seed = int(os.environ.get("HPC_DISTKV_SEED", random.SystemRandom().randrange(10**6)))
    print(f"HPC_DISTKV_SEED={seed}", file=sys.stderr)
    rng = random.Random(seed)
    interrupted, answered = 0, []
    for _ in range(4 * INTERRUPTIONS):
        way = (signal.SIGUSR2, signal.SIGKILL, signal.SIGTERM)[interrupted % 3]
        if interrupt(job, options, ranks, way, rng):
            interrupted += 1
            answered.append(job.output.read_bytes().count(b"\n") if job.output.exists() else 0)
        else:  # all rows were answered before: begin again
            assert job.answers() == whole.answers()
            job.output.unlink()
        if interrupted == INTERRUPTIONS:
            break
    print(f"rows answered at the interruptions: {answered}", file=sys.stderr)
    assert interrupted == INTERRUPTIONS
    ran = job.run(ranks, *options, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert len(job.lines()) == len(rows)
    assert job.answers() == whole.answers()
    assert sorted(path.name for path in tmp_path.iterdir() if "results" in path.name) == [
        "results.jsonl",
        "results.jsonl.meta.json",
    ]


def test_a_stopped_job_keeps_what_it_has_begun(tmp_path, tiny_model):
    """Rows far too long to end within the grace go on where they were: nothing is made twice."""
    prompts = [random_ids(20, random.Random(n)) for n in range(4)]
    rows = [
        completion(f"row {n}", ids, 700, temperature=0.8, ignore_eos=True)
        for n, ids in enumerate(prompts)
    ]
    job = BatchJob(tmp_path, tiny_model, rows)
    options = ("--num-blocks", 200, "--grace", 0)
    run = Launched(job, 2, *options)
    run.wait_for_a_step()
    run.ranks()[1].send_signal(signal.SIGUSR2)
    ran = run.end()
    assert ran.returncode == 75, ran.stderr
    kept = job.figures()["put_aside_tokens"]
    assert f"{kept} output tokens are saved" in ran.stdout
    assert re.search(r"rank 1 on \S+ was asked to stop: beginning nothing new", ran.stderr)
    assert "this run ends with status 75: rows are left" in ran.stderr
    made = job.figures()["counters"]["generated_tokens"]
    assert 0 < kept <= made < 4 * 700
    ran = job.run(2, *options)
    assert ran.returncode == 0, ran.stderr
    assert job.figures()["counters"]["generated_tokens"] == 4 * 700 - kept
    assert {tokens for _, tokens, _ in job.answers().values()} == {700}
    assert f"4 rows were begun, with {kept:,} output tokens" in ran.stderr
    both = read_run([job.metrics, job.metrics.with_name("metrics.1.json")])
    assert [run["stopped"] for run in both.runs] == [True, False]
    assert both.metrics["counters"]["generated_tokens"] == 4 * 700


# A rank that hangs


def test_a_suspended_rank_ends_the_job_with_one_message_and_no_orphans(tmp_path, tiny_model):
    rows = [
        completion(f"row {n}", random_ids(20, random.Random(n)), 1000, ignore_eos=True)
        for n in range(12)
    ]
    job = BatchJob(tmp_path, tiny_model, rows)
    run = Launched(job, 3, "--num-blocks", 100, "--stall-timeout", STALL)
    run.wait_for_a_step()
    began = time.monotonic()
    run.ranks()[2].suspend()
    ran = run.end(90)
    print(f"{time.monotonic() - began:.1f} s after SIGSTOP:\n{ran.stderr}", file=sys.stderr)
    assert ran.returncode == 70, ran.stderr
    assert "no answer from rank 2 on " in ran.stderr
    assert re.search(r"rank 2 on \S+: its last report was that of round \d+, with", ran.stderr)
    assert re.search(r"rank 0 on \S+ waits for rank 2 on \S+: ", ran.stderr)
    assert ran.stderr.count("no answer from") == 1
    assert set(re.findall(r"^\S+ \S+  \[rank (\d) on", ran.stderr, re.MULTILINE)) == {"0"}
    assert not list(tmp_path.glob("*.tmp"))
