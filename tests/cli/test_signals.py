"""Signals in the first and in the last moment of a run, when no rank computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from batch_job import BatchJob, completion, run_script

EARLY = """
import os, signal, sys
from hpc_distkv.cli import main
run = main._run
def begin(arrived):
    assert not {"click", "torch", "mpi4py"} & set(sys.modules)
    os.kill(os.getpid(), signal.SIGUSR2)
    return run(arrived)
main._run = begin
main.main()
"""
LATE = """
import os, signal, sys
from hpc_distkv.cli import main
class Module:
    "Goes when Python has taken its signal handlers away."
    def __del__(self, kill=os.kill, me=os.getpid(), signals=(signal.SIGUSR2, signal.SIGTERM)):
        for number in signals:
            kill(me, number)
sys.modules["last"] = Module()
main.main()
"""


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> BatchJob:
    return BatchJob(tmp_path, tiny_model, [completion("a", [5, 6], 3)])


def test_a_signal_before_anything_is_loaded_stops_the_run_to_be_started_again(job):
    script = job.input.with_name("early.py")
    script.write_text(EARLY)
    ran = run_script(0, script, *job.arguments())
    assert ran.returncode == 75, ran.stderr
    *_, line = ran.stderr.splitlines()
    assert re.match(r"\d\d-\d\d [\d:]{8}  stopped before the model was read", line)
    assert not job.output.with_name("results.jsonl.claim").exists()
    assert not job.output.exists()


def test_signals_when_all_is_written_change_no_status(job):
    script = job.input.with_name("late.py")
    script.write_text(LATE)
    ran = run_script(0, script, *job.arguments())
    assert ran.returncode == 0, ran.stderr
    assert len(job.answers()) == 1
