from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comm_contract import CONTRACT
from local_ranks import leftovers, open_local, run_local
from mpirun import clean_environment, mpirun, run_mpi
from seeded_schedule import SeededSchedule

SCRIPT = str(Path(__file__).with_name("comm_contract.py"))


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_threads_keep_the_contract(promise, ranks):
    comms = open_local(ranks, stall_timeout=20)
    run_local(comms, promise)
    assert leftovers(comms) == []


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_interleavings_keep_the_contract(promise, seed):
    comms = open_local(2 + seed % 2, schedule=SeededSchedule(seed))
    run_local(comms, promise)
    assert leftovers(comms) == []


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_mpi_ranks_keep_the_contract(ranks):
    ran = run_mpi(ranks, [SCRIPT, str(ranks)], timeout=90)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"kept: {promise.__name__}" for promise in CONTRACT]


def test_one_process_without_a_launcher_keeps_the_contract():
    ran = subprocess.run(
        [sys.executable, SCRIPT, "1"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == len(CONTRACT)
