from __future__ import annotations

import subprocess
import sys

import pytest
from mpirun import clean_environment, is_open_mpi

from hpc_distkv.comm.mpi.launch import check_launch, prepare_launch, ranks_asked_for
from hpc_distkv.comm.mpi.library import LaunchError, MpiLibrary


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


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
LONE_STEP = {**STEP, "SLURM_STEP_NUM_TASKS": "1"}
SLURM_PMI2 = {**STEP, "PMI_FD": "11", "PMI_RANK": "0", "PMI_SIZE": "4"}
SLURM_PMIX = {**STEP, "PMIX_NAMESPACE": "slurm.pmix.1.0", "PMIX_RANK": "0", "PMIX_VERSION": "4"}
OPEN_MPI_RUN = {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_NAMESPACE": "prterun@1", "PMIX_RANK": "0"}
MPICH = MpiLibrary("MPICH Version: 5.0.2", pmix=False)
MPICH_WITH_PMIX = MpiLibrary("MPICH Version: 4.3.0", pmix=True)
OPEN_MPI = MpiLibrary("Open MPI v5.0.11", pmix=True)
OLD_OPEN_MPI = MpiLibrary("Open MPI v4.1.4", pmix=False)
INTEL_MPI = MpiLibrary("Intel(R) MPI Library 2021.13 for Linux* OS", pmix=False)
CRAY_MPICH = MpiLibrary("MPI VERSION : CRAY MPICH version 8.1.28.1", pmix=False)


@pytest.mark.parametrize(
    ("library", "environ", "said"),
    [
        (MPICH, SLURM_PMIX, "one of 4 ranks .* speaks PMI, not the launcher's PMIx.*--mpi=pmi2"),
        (MPICH, OPEN_MPI_RUN, "Open MPI's mpirun.* speaks PMI, not the launcher's PMIx"),
        (MPICH, {"PMIX_NAMESPACE": "x", "PMIX_RANK": "0"}, "one of several ranks"),
        (OPEN_MPI, SLURM_PMI2, "one of 4 ranks .* speaks PMIx, not the launcher's PMI"),
    ],
)
def test_a_library_that_its_launcher_would_end_does_not_start(library, environ, said):
    with pytest.raises(LaunchError, match=said):
        prepare_launch(library, dict(environ))


@pytest.mark.parametrize(
    ("library", "environ"),
    [
        (MPICH, {}),
        (MPICH, STEP),
        (MPICH, SLURM_PMI2),
        (MPICH, {**SLURM_PMIX, "MPIR_CVAR_PMI_VERSION": "1"}),
        (MPICH_WITH_PMIX, SLURM_PMIX),
        (OPEN_MPI, SLURM_PMIX),
        (OPEN_MPI, OPEN_MPI_RUN),
        (OPEN_MPI, {**SLURM_PMI2, **OPEN_MPI_RUN}),
        (OLD_OPEN_MPI, SLURM_PMI2),
        (INTEL_MPI, SLURM_PMI2),
        (INTEL_MPI, SLURM_PMIX),
        (CRAY_MPICH, SLURM_PMIX),
    ],
)
def test_what_may_go_well_starts_as_it_is(library, environ):
    left = dict(environ)
    prepare_launch(library, left)
    assert left == environ


@pytest.mark.parametrize("environ", [LONE_STEP, {"PMI_FD": "11", "PMI_RANK": "0", "PMI_SIZE": "4"}])
def test_mpich_is_not_told_of_a_pmix_launcher_that_did_not_start_it(environ):
    """In a shell of `srun --pty`, or under the mpirun of MPICH in it."""
    left = {**environ, "PMIX_NAMESPACE": "slurm.pmix.1.0", "PMIX_RANK": "0", "PMIX_VERSION": "4"}
    prepare_launch(MPICH, left)
    assert left == environ


def test_mpi_starts_in_a_shell_that_a_pmix_launcher_started():
    if is_open_mpi():
        pytest.skip("Open MPI looks for the PMIx server")
    ran = run_python(
        "from hpc_distkv.comm.mpi.start import open_mpi; print(open_mpi(1.0).world.size)",
        **{**LONE_STEP, "PMIX_NAMESPACE": "slurm.pmix.1.0", "PMIX_RANK": "0", "PMIX_VERSION": "4"},
    )
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr


@pytest.mark.parametrize(
    ("library", "interface"),
    [
        (MPICH, "pmi2"),
        (MPICH_WITH_PMIX, "pmix"),
        (OPEN_MPI, "pmix"),
        (OLD_OPEN_MPI, "pmix"),
        (INTEL_MPI, "pmi2"),
        (CRAY_MPICH, "cray_shasta"),
    ],
)
def test_each_library_has_its_interface_of_srun(library, interface):
    assert library.srun_interface == interface


def test_the_library_is_known_without_starting_it():
    ran = run_python(
        "from hpc_distkv.comm.mpi.library import load_library\n"
        "library = load_library()\n"
        "from mpi4py import MPI\n"
        "print(library.vendor, library.srun_interface, MPI.Is_initialized())"
    )
    expected = "Open MPI pmix" if is_open_mpi() else "MPICH pmi2"
    assert ran.stdout == f"{expected} False\n", ran.stderr


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
        "from hpc_distkv.comm.mpi.start import open_mpi; open_mpi(1.0)",
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_TASKS="2",
    )
    assert ran.returncode != 0
    assert "LaunchError" in ran.stderr
    assert "srun --mpi=list" in ran.stderr


def test_no_mpi_library_is_explained():
    ran = run_python(
        "from hpc_distkv.comm.mpi.start import open_mpi; open_mpi(1.0)",
        MPI4PY_LIBMPI="/nowhere/libmpi.so",
    )
    assert ran.returncode != 0
    assert "LaunchError: mpi4py found no usable MPI library" in ran.stderr
    assert "pip install mpich" in ran.stderr


def test_import_does_not_start_mpi():
    ran = run_python(
        "import sys, hpc_distkv.comm.mpi.start, hpc_distkv.comm.abort\n"
        "print('mpi4py.MPI' in sys.modules)"
    )
    assert ran.stdout == "False\n", ran.stderr


def test_world_of_the_wrong_size_is_explained():
    ran = run_python("from hpc_distkv.comm.mpi.start import open_mpi; open_mpi(1.0, tp=2)")
    assert "1 ranks cannot be cut into instances of 2" in ran.stderr
