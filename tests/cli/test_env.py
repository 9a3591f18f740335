"""`hpc-distkv env`: alone, under mpirun, without MPI, and when launcher and MPI disagree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from batch_job import COMMAND, run_command
from mpirun import clean_environment, is_open_mpi, mpirun


def run_alone(**environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, COMMAND, "env"],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(environ),
        check=False,
    )


def test_alone_it_shows_one_rank():
    done = run_alone(SLURM_JOB_ID="418", SLURM_NTASKS="4", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no launcher: 1 rank\n" in done.stdout
    assert "ranks     1 on 1 node\n" in done.stdout
    assert "JOB_ID=418 NTASKS=4" in done.stdout
    assert "none CUDA_VISIBLE_DEVICES=\n" in done.stdout
    for name in ("Python", "torch", "mpi4py", "hpc-distkv", "CUDA of torch"):
        assert f"{name} " in done.stdout


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_ranks_and_the_links_between_them_are_shown_once():
    done = run_command(3, "env")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("launcher  ") == 1
    assert "ranks     3 on 1 node\n" in done.stdout
    places = [line.split()[0] for line in done.stdout.splitlines() if " of 3 " in line]
    assert places == ["0", "1", "2"]
    assert "(3 pairs)" in done.stdout
    assert "within a node" in done.stdout


def test_without_mpi_it_says_so_and_shows_the_rest():
    done = run_alone(MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert done.returncode == 0, done.stderr
    assert "MPI       does not work" in done.stdout
    assert "pip install mpich" in done.stdout
    assert "torch " in done.stdout
    assert "Traceback" not in done.stderr


def test_rank_0_of_a_launcher_that_does_not_count_them_leaves_as_the_others_do():
    if is_open_mpi():
        pytest.skip("Open MPI looks for the PMIx server")
    done = run_alone(PMIX_NAMESPACE="prterun-1", PMIX_RANK="0")
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("srun --mpi=pmix for Open MPI") == 1


@pytest.mark.parametrize("interface", [{}, {"PMIX_NAMESPACE": "slurm.pmix.3.0", "PMIX_RANK": "0"}])
def test_a_wrong_pmi_is_explained_beside_all_that_is_known(interface):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    if interface and is_open_mpi():
        pytest.skip("Open MPI looks for the PMIx server")
    done = run_alone(**step, **interface)
    assert done.returncode == 2, done.stderr
    assert "torch " in done.stdout
    assert "MPI       does not work: " in done.stdout
    assert done.stdout.count("srun --mpi=pmix for Open MPI") == 1
