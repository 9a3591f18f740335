"""How much memory a rank's pools take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from hpc_distkv.comm.transport import Comm
from hpc_distkv.engine.activations import activation_peak, free_memory
from hpc_distkv.engine.config import EngineConfig, OptionError
from hpc_distkv.engine.largest_step import LargestStep
from hpc_distkv.engine.options import EngineOptions
from hpc_distkv.memory.mapped import mapped_memory
from hpc_distkv.model.decoder import Decoder

KV_SHARE = 0.4
"""Part of a node's available memory that its ranks' pools take unless told otherwise."""


class KvShare(NamedTuple):
    """What one rank, or all ranks of an instance alike, have for KV."""

    blocks: int
    """rBlocks of the pool."""
    lendable: int
    """Most of them that others may borrow."""
    host_blocks: int
    """rBlocks in the host's memory."""
    copy_seconds: float
    """In which an rBlock goes there and comes back."""
    staged_from: float
    """Query rows from which rBlocks there are copied to be attended to."""


def merged(ranks: Iterable[KvShare]) -> KvShare:
    """Of the ranks of an instance, which hold the same rBlocks and do the same with them: the
    smallest pools and the dearest copies."""
    blocks, lendable, host_blocks, copy_seconds, staged_from = zip(*ranks, strict=True)
    return KvShare(
        min(blocks), min(lendable), min(host_blocks), max(copy_seconds), max(staged_from)
    )


def pool_blocks(
    comm: Comm, model: Decoder, options: EngineOptions, config: EngineConfig, block_bytes: int
) -> int:
    """rBlocks of the rank's pool, as many as are wanted or as there is memory for. Raises
    OptionError."""
    if comm.device.place.type == "cpu":
        return options.num_blocks or cpu_blocks(comm, options.kv_memory, block_bytes)
    wanted = options.num_blocks * block_bytes if options.num_blocks else options.kv_memory
    if options.allow_gpu_sharing and wanted is None:
        raise OptionError(
            "ranks that share a GPU cannot see what the others will take: give --kv-memory or "
            "--num-blocks with --allow-gpu-sharing"
        )
    others = comm.world.instances - 1 if config.policy.lending else 0
    if config.host_blocks:
        others += 1  # The host's processor attends for this rank, as a creditor does.
    step = LargestStep(
        tokens=config.max_num_batched_tokens,
        rows=config.max_num_seqs,
        block_size=config.block_size,
        others=others,
        shares=config.prefix_caching,
        recorded=config.cuda_graphs,
        stages=bool(config.host_blocks),
    )
    peak = activation_peak(model, comm.device, step)
    peak += config.spare * block_bytes  # beyond the pool
    free = free_memory(comm.device)
    return device_blocks(
        free, peak, options.gpu_memory_utilization, wanted, block_bytes, step.tokens
    )


def cpu_blocks(comm: Comm, kv_memory: int | None, block_bytes: int) -> int:
    """rBlocks of a pool in the host's memory: of `kv_memory` bytes, or by default. Raises
    OptionError if there is no room for one."""
    if kv_memory is None:
        kv_memory = int(KV_SHARE * available_memory() / comm.world.local_size)
    if kv_memory < block_bytes:
        raise OptionError(
            f"one rBlock takes {block_bytes} bytes, but there are {kv_memory} bytes for the KV "
            "cache: give more --kv-memory or a smaller --block-size"
        )
    return kv_memory // block_bytes


def device_blocks(
    free: int, peak: int, utilization: float, wanted: int | None, block_bytes: int, tokens: int
) -> int:
    """rBlocks of a pool on a GPU that has `free` bytes beside the weights, where a step of `tokens`
    takes `peak` bytes: as many bytes as are `wanted`, or what is left of the `utilization` of what
    is free. Raises OptionError, with the sums, if that is not there."""
    room = int(free * (utilization if wanted is None else 1.0)) - peak
    if max(wanted or block_bytes, block_bytes) > room:
        asked = "one rBlock takes" if wanted is None else "the KV cache is to have"
        part = f"{utilization:g} of " if wanted is None else ""
        raise OptionError(
            f"{asked} {max(wanted or 0, block_bytes)} bytes, but of {part}the {free} bytes that "
            f"the GPU has free beside the weights, {peak} are for steps of {tokens} tokens: give "
            "less --max-num-batched-tokens, --max-num-seqs or --kv-memory, more "
            "--gpu-memory-utilization, or more ranks to a replica (--tensor-parallel-size)"
        )
    return (wanted or room) // block_bytes


def tier_blocks(comm: Comm, memory: int | None, path: str | None, block_bytes: int) -> int:
    """rBlocks that `memory` bytes of the host hold beside a rank's pool, in a file below `path` if
    it is given. Raises OptionError if these options cannot work."""
    if memory is None:
        if path is not None:
            raise OptionError("--host-kv-path needs --host-kv-memory: how much may go there")
        return 0
    if memory < block_bytes:
        raise OptionError(
            f"one rBlock takes {block_bytes} bytes, but --host-kv-memory gives {memory}: give more"
        )
    if path is not None and comm.device.place.type != "cpu":
        raise OptionError(
            "--host-kv-path is for ranks on CPUs: a GPU copies from memory that is locked in "
            "place, so give --host-kv-memory alone"
        )
    ranks, there = comm.world.local_size, available_memory()
    if path is None and memory * ranks > there:
        raise OptionError(
            f"--host-kv-memory gives {memory} bytes to each of {ranks} ranks on this node, which "
            f"has {there} bytes available: give less, or --host-kv-path on a disk of the node"
        )
    return memory // block_bytes


def host_memory(comm: Comm, size: int, folder: str | None) -> torch.Tensor:
    """uint8 `[size]` of the host's memory, in a file below `folder` if it is given. Raises
    OptionError."""
    try:
        if folder is not None:
            memory = mapped_memory(size, Path(folder))
        else:
            memory = torch.empty(size, dtype=torch.uint8)
        comm.device.pin(memory)
    except OSError as error:
        raise OptionError(
            f"--host-kv-path {folder}: no file of {size} bytes can be made there "
            f"({error.strerror}): give another directory, or less --host-kv-memory"
        ) from error
    except RuntimeError as error:
        raise OptionError(
            f"the host has no memory for --host-kv-memory ({error}): give less"
        ) from error
    return memory


def available_memory() -> int:
    """Bytes this node can still give: what the kernel says, or less if Slurm or a control group
    allows less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    limits = [int(fields["MemAvailable"].split()[0]) << 10, *_group_limits()]
    for name, unit in (
        ("SLURM_MEM_PER_NODE", 1),
        ("SLURM_MEM_PER_CPU", int(os.environ.get("SLURM_CPUS_ON_NODE") or 1)),
    ):
        allowed = os.environ.get(name, "")
        if allowed.isdecimal() and int(allowed):
            limits.append((int(allowed) << 20) * unit)
    return min(limits)


def _group_limits() -> Iterator[int]:
    """What is left to the control groups (version 2) that this process is in."""
    try:
        path = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    except OSError:
        return
    group = Path("/sys/fs/cgroup") / path.lstrip("/")
    for folder in (group, *group.parents):
        try:
            most = (folder / "memory.max").read_text().strip()
            used = (folder / "memory.current").read_text().strip()
        except OSError:
            continue
        if most.isdecimal():
            yield max(0, int(most) - int(used))
