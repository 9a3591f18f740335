"""The memory that a job asks Slurm for."""

from __future__ import annotations

from hpc_distkv.slurm.script import JobScript


def memory_needed(script: JobScript) -> int | None:
    """Bytes of a node's memory for its ranks; None where that cannot be known from here."""
    return None
