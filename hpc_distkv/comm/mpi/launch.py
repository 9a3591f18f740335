"""Whether MPI and the launcher that started this process agree on how many ranks there are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, MutableMapping

from hpc_distkv.comm.mpi.library import LaunchError, MpiLibrary

RANK_COUNTS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "an MPICH-like launcher (PMI)",
}
"""Set for each rank by the launcher nearest to it; Slurm's own counts come after these, because
mpirun inside a Slurm job has its say last."""
RANK_VARIABLES = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""By which launchers tell each rank its number."""
PMI = ("PMI_FD", "PMI_PORT")
"""By which a process finds a launcher that speaks PMI-1 or PMI-2."""
PMIX = "PMIX_"
"""How the variables begin by which a process finds a launcher that speaks PMIx."""
FIRST_WORDS = 2.0
"""Seconds that ranks give each other to come and say what is wrong."""
PMIX_LAUNCHER = "a PMIx launcher"
"""One that does not say how many ranks it started."""
CHOSEN = ("MPIR_CVAR_PMI_VERSION", "MPICH_PMI_VERSION", "MPIR_PARAM_PMI_VERSION")
"""With one of these the user tells MPICH what to speak."""


def ranks_asked_for(environ: Mapping[str, str]) -> tuple[int, str]:
    """How many ranks the launcher started, as far as the environment tells, and who says so."""
    for variable, launcher in RANK_COUNTS.items():
        if environ.get(variable, "").isdigit():
            return int(environ[variable]), f"{launcher}, {variable}={environ[variable]}"
    # Only inside a step: a batch script has SLURM_NTASKS too, but is itself one process.
    if "SLURM_STEP_ID" in environ:
        for variable in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
            if environ.get(variable, "").isdigit():
                return int(environ[variable]), f"srun, {variable}={environ[variable]}"
    rank = environ.get("PMIX_RANK", "")
    if rank.isdigit():
        return int(rank) + 1, f"{PMIX_LAUNCHER}, PMIX_RANK={rank}"
    return 1, "no launcher"


def first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher calls this process rank 0, or nothing at all. MPI need not run."""
    return all(environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def may_be_several(environ: Mapping[str, str]) -> bool:
    """Whether there are other ranks, as far as the environment tells: of a PMIx launcher rank 0
    cannot know."""
    asked, source = ranks_asked_for(environ)
    return asked > 1 or source.startswith(PMIX_LAUNCHER)


def prepare_launch(library: MpiLibrary, environ: MutableMapping[str, str]) -> None:
    """Look, before MPI starts, whether library and launcher can speak with each other: some
    libraries end the process if not. Raises LaunchError only where that is sure.

    MPICH without PMIx stops wherever it sees a PMIx launcher, also one that started only the shell
    or the mpirun that it was started from: of such a launcher it is not told.
    """
    asked, source = ranks_asked_for(environ)
    pmix = [name for name in environ if name.startswith(PMIX)]
    pmi = any(name in environ for name in PMI)
    if library.vendor == "MPICH" and not library.pmix and pmix:
        if any(name in environ for name in CHOSEN):
            return
        if not pmi and may_be_several(environ):
            raise _mismatch(library.name, asked, source, "speaks PMI, not the launcher's PMIx")
        for name in pmix:
            del environ[name]
    if _pmix_only(library) and pmi and not pmix and asked > 1:
        raise _mismatch(library.name, asked, source, "speaks PMIx, not the launcher's PMI")


def check_launch(size: int, library: str, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if a launcher started several ranks and each sees only itself.

    Without this check a job whose launcher and MPI library speak different process management
    interfaces runs N times the whole work, side by side, and reports success.
    """
    asked, source = ranks_asked_for(environ)
    if size > 1 or asked <= 1:
        return
    raise _mismatch(library, asked, source, "sees only itself")


def _pmix_only(library: MpiLibrary) -> bool:
    """Open MPI from version 5 on; older ones may be built with Slurm's PMI."""
    major = library.name.partition("Open MPI v")[2].partition(".")[0]
    return library.vendor == "Open MPI" and major.isdigit() and int(major) >= 5


def _mismatch(library: str, asked: int, source: str, trouble: str) -> LaunchError:
    return LaunchError(
        f"this process was started as one of {asked if asked > 1 else 'several'} ranks "
        f"({source}), but its MPI library ({library}) {trouble}: launcher and "
        "library do not understand each other. "
        "Under Slurm name the interface: srun --mpi=pmix for Open MPI, srun --mpi=pmi2 for MPICH "
        "and its relatives (srun --mpi=list shows what the site has; Intel MPI also wants "
        "I_MPI_PMI_LIBRARY, the path of Slurm's libpmi2.so). With mpirun use the one that belongs "
        "to this library. If the library is not the one you loaded, set MPI4PY_LIBMPI to the path "
        "of the right libmpi.so."
    )


def leave_together(environ: Mapping[str, str] = os.environ) -> bool:
    """Before one of several ranks leaves with a status other than 0: whether there may be several.

    Launchers end what is left of a job when the first process leaves so. That must not be before
    rank 0 has said why, nor take another rank's status from it.
    """
    if not may_be_several(environ):
        return False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(FIRST_WORDS)
    return True
