"""The memory that a job asks Slurm for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.regular import open_regular
from hpc_distkv.slurm.script import JobScript
from hpc_distkv.start.needs import GIVEN_SHARE, rank_memory
from hpc_distkv.start.options import EngineOptions

SAMPLE = 1 << 20
"""Bytes of the input by which its rows are estimated."""


class NodeMemory(NamedTuple):
    """Of a node of the job."""

    mib: int
    """MiB, with a reserve for what was counted too low."""
    words: str
    """What takes it."""


def memory_needed(script: JobScript, options: EngineOptions) -> NodeMemory | None:
    """What the ranks of a node need of its memory under the engine options of the job; None where
    the model cannot be seen from here, or no node is asked for.

    All count as rank 0, because each gets an equal share.
    """
    if script.kind == "mpirun" or script.model is None:
        return None
    try:
        config = ModelConfig.from_dir(script.folder / script.model, weightless=script.dummy)
    except ModelError:
        return None
    tasks = script.tasks_per_node
    memory = rank_memory(
        config,
        options,
        instances=max(1, script.nodes * tasks // options.tensor_parallel_size),
        gpu=script.gpus_per_node > 0 and options.device != "cpu",
        rows=_rows(script.folder / script.input) if script.input else 0,
    )
    ranks = (
        f"each of the {tasks} ranks on a node needs" if tasks > 1 else "the rank on a node needs"
    )
    return NodeMemory(
        int(tasks * memory.total / GIVEN_SHARE / 2**20) + 1, f"{ranks} {memory.words()}"
    )


def _rows(path: Path) -> int:
    """Rows of the input, by the mean length of its first ones; 0 if it cannot be seen."""
    try:
        with open_regular(path) as file:
            sample = file.read(SAMPLE)
            size = os.fstat(file.fileno()).st_size
        return size * sample.count(b"\n") // max(1, len(sample))
    except OSError:
        return 0
