from __future__ import annotations

import subprocess
import sys

import pytest
from mpirun import clean_environment

from hpc_distkv.comm.launch import LaunchError, check_launch, ranks_asked_for


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"},
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMIX_RANK": "3"},
    ],
)
def test_many_processes_that_each_see_one_rank_are_refused(environ):
    with pytest.raises(LaunchError, match=r"4 ranks .*--mpi=pmix .*--mpi=pmi2 .*--mpi=list"):
        check_launch(1, "Open MPI v5", environ)
    check_launch(4, "Open MPI v5", environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script itself
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMIX_RANK": "0"},
    ],
)
def test_one_process_that_was_meant_to_be_alone_may_run(environ):
    assert ranks_asked_for(environ)[0] == 1
    check_launch(1, "MPICH", environ)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_opening_refuses_a_silent_singleton():
    ran = run_python(
        "from hpc_distkv.comm.mpi import open_mpi; open_mpi(1.0)",
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_TASKS="2",
    )
    assert ran.returncode != 0
    assert "LaunchError" in ran.stderr
    assert "srun --mpi=list" in ran.stderr


def test_no_mpi_library_is_explained():
    ran = run_python(
        "from hpc_distkv.comm.mpi import open_mpi; open_mpi(1.0)",
        MPI4PY_LIBMPI="/nowhere/libmpi.so",
    )
    assert ran.returncode != 0
    assert "LaunchError: mpi4py found no usable MPI library" in ran.stderr
    assert "pip install mpich" in ran.stderr


def test_import_does_not_start_mpi():
    ran = run_python(
        "import sys, hpc_distkv.comm.mpi, hpc_distkv.comm.abort\nprint('mpi4py.MPI' in sys.modules)"
    )
    assert ran.stdout == "False\n", ran.stderr


def test_world_of_the_wrong_size_is_explained():
    ran = run_python("from hpc_distkv.comm.mpi import open_mpi; open_mpi(1.0, tp=2)")
    assert "1 ranks cannot be cut into instances of 2" in ran.stderr
