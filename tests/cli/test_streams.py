"""What becomes of a command whose messages cannot be written."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from batch_job import COMMAND, BatchJob, completion
from mpirun import clean_environment, mpirun, run_mpi

from hpc_distkv.cli.streams import Stream, shown

ROWS = 5


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> BatchJob:
    rows = [completion(f"row {number}", [5, 6], 3) for number in range(ROWS)]
    return BatchJob(tmp_path, tiny_model, rows)


def shell(line: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`line` in bash, with `words` as its "$@"."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", *map(str, words)],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("ways", ["2>/dev/full >/dev/full", "2>&1 | head -1"])
def test_a_log_that_cannot_be_written_ends_no_job(ways, job):
    ran = shell(f'"$@" {ways}', COMMAND, *job.arguments())
    assert ran.returncode == 0, ran.stderr
    assert len(job.answers()) == ROWS


def test_what_is_lost_on_one_stream_is_told_on_the_other_and_error_rows_make_status_1(job):
    with job.input.open("a") as file:
        file.write("{nonsense\n")
    ran = shell('"$@" 2>/dev/full', COMMAND, *job.arguments())
    assert ran.returncode == 1
    assert re.search(
        r"^lines lost on standard error: [1-9]\d* \(No space left on device\)$", ran.stdout, re.M
    )


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_ranks_without_streams_answer_all_rows(job):
    script = job.input.with_name("closed.py")
    script.write_text(
        "import os, sys\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        f"os.execv(sys.executable, [sys.executable, {COMMAND!r}, *sys.argv[1:]])\n"
    )
    ran = run_mpi(2, [str(script), *job.arguments()])
    assert ran.returncode == 0, ran.stderr
    assert len(job.answers()) == ROWS


@pytest.mark.parametrize(
    ("ways", "status", "said"),
    [
        (">/dev/full", 70, "(No space left on device)"),
        (">&-", 70, "(Bad file descriptor)"),
        ("| true", 141, ""),
    ],
)
def test_a_command_whose_purpose_is_what_it_prints_fails_if_it_cannot(ways, status, said):
    done = shell(f'"$@" {ways}', COMMAND, "--help")
    assert done.returncode == status
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == (1 if said else 0)


def test_a_gap_is_told_where_it_is_once_there_is_room(tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    filled = os.write(write, b"x" * 10**6)
    stream = Stream(write, patience=0.0)
    assert stream.write(b"one\ntwo\n") == 8
    assert stream.write(b"three\n") == 6
    assert os.read(read, filled) == b"x" * filled
    stream.write(b"four\n")
    assert os.read(read, 100) == b"[lines lost here: 3 (nobody reads it)]\nfour\n"
    assert stream.lost == 3
    os.close(read)
    stream.write(b"five\n")
    assert stream.error is not None
    assert stream.error.errno == errno.EPIPE
    os.close(write)


def test_a_full_pipe_is_waited_for_where_output_is_the_purpose():
    read, write = os.pipe()
    stream = Stream(write, patience=None)
    text = b"line\n" * 100_000
    got = bytearray()

    def read_slowly() -> None:
        time.sleep(0.2)
        while len(got) < len(text):
            got.extend(os.read(read, 1 << 16))

    reader = threading.Thread(target=read_slowly)
    reader.start()
    stream.write(text)
    reader.join(60)
    assert bytes(got) == text
    assert stream.error is None
    os.close(read)
    os.close(write)


def test_a_status_of_its_own_is_kept(tmp_path):
    stream = Stream(os.open("/dev/full", os.O_WRONLY), None)
    assert shown(0, stream) == 0
    stream.write(b"lost")
    assert [shown(status, stream) for status in (0, None, 2)] == [70, 70, 2]
    os.close(stream.fileno())


def test_an_exception_of_any_kind_is_a_fault_and_no_row(tmp_path):
    script = (
        "import sys\n"
        "from hpc_distkv.cli import main, status\n"
        "class Panic(BaseException): pass\n"
        "def read(*_): raise Panic()\n"
        "status.read_statuses = read\n"
        "sys.argv = ['hpc-distkv', 'status', 'results.jsonl']\n"
        "main.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 70
    assert "Panic" in done.stderr
