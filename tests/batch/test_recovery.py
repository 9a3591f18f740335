"""A job that is cut, killed or out of room resumes, and every row still has exactly one line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_fakes import (
    MIXED,
    answer,
    completion,
    make_service,
    open_journal,
    read_lines,
    run_job,
    summaries,
    write_lines,
)

from hpc_distkv.batch.errors import JournalError, RowError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.rows import which_choice
from hpc_distkv.batch.job import Job


def test_resume_after_a_cut_at_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, MIXED)
    run_job(source, output)
    whole, expected = output.read_bytes(), summaries(output)
    for cut in range(len(whole)):
        output.write_bytes(whole[:cut])
        run_job(source, output)
        assert summaries(output) == expected, f"cut at byte {cut}"


def test_resume_whatever_order_the_answers_came_in(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, MIXED)
    run_job(source, output)
    expected = summaries(output)
    lines = output.read_bytes().splitlines(keepends=True)
    for seed in range(20):
        shuffled = random.Random(seed).sample(lines, k=random.Random(seed).randrange(len(lines)))
        output.write_bytes(b"".join(shuffled))
        run_job(source, output)
        assert summaries(output) == expected


def test_rows_in_flight_are_left_for_the_rerun(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, [completion(str(i)) for i in range(5)])
    job = Job(Intake(source), open_journal(output, {}), make_service())
    requests = list(job.requests())
    assert [which_choice(request.id) for request in requests] == [(i, 0) for i in range(5)]
    for request in (requests[3], requests[1]):
        job.finish(answer(request))
    job.refuse(requests[2].id, RowError("never fits", code="context_length_exceeded"))
    assert job.in_flight == 2
    assert not job.complete
    job.close()
    rerun = Job(Intake(source), open_journal(output, {}), make_service())
    assert [which_choice(request.id) for request in rerun.requests()] == [(0, 0), (4, 0)]
    assert rerun.skipped == 3


RUNNER = """
import sys
from pathlib import Path
from batch_fakes import run_job
run_job(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_kill_9_while_writing(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    broken = [b"broken", completion(None), completion("0")]
    good = [completion(str(i), "x" * (i % 90)) for i in range(20_000)]
    write_lines(source, [row for i, row in enumerate(good) for row in (row, *broken[: i % 4])])
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", RUNNER, str(source), str(output)]
    environment = {**os.environ, "PYTHONPATH": path}
    kills = 0
    rng = random.Random(0)
    while True:
        process = subprocess.Popen(command, env=environment)
        size = output.stat().st_size if output.exists() else 0
        while kills < 5 and process.poll() is None:
            time.sleep(rng.uniform(0.001, 0.01))
            if output.exists() and output.stat().st_size > size + 100_000:
                process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    rows = read_lines(output)
    with source.open("rb") as file:
        assert Counter(row["id"] for row in rows) == Counter(
            f"batch_req_{number}" for number, _ in enumerate(file)
        )


def test_the_whole_way_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a small file system")
    source, output = tmp_path / "in", disk / "out"
    try:
        write_lines(source, [completion(str(i)) for i in range(1000)])
        with pytest.raises(JournalError, match="No space left"):
            run_job(source, output)
        written = len(read_lines(output))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        job = run_job(source, output)
        assert (job.skipped, job.answered) == (written, 1000 - written)
        assert len(read_lines(output)) == 1000
    finally:
        subprocess.run(["umount", str(disk)], check=True)
