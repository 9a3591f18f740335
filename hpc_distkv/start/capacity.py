"""How much memory a rank's pools take, and where it is."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig, dtype_name
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.start.activations import activation_peak, free_memory
from hpc_distkv.start.memory_limits import Limit, Room, Seen, in_memory, look, room
from hpc_distkv.start.needs import (
    Budget,
    dtype_of,
    loading_memory,
    rank_memory,
    shard_memory,
    wanted_bytes,
)
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.sizes import LargestStep


class KvShare(NamedTuple):
    """What a rank, or every rank of an instance, has for KV."""

    blocks: int
    """rBlocks of the pool."""
    lendable: int
    """Of these, at most so many may be lent."""
    host_blocks: int
    """rBlocks in the host's memory."""
    copy_seconds: float
    """Seconds to copy an rBlock there and back."""
    staged_from: float
    """Query rows from which the device attends to copies of rBlocks there (`host_costs`)."""


def merged(ranks: Iterable[KvShare]) -> KvShare:
    """The share of an instance: the smallest pools and the slowest copies of its ranks, which all
    hold the same rBlocks."""
    blocks, lendable, host_blocks, copy_seconds, staged_from = zip(*ranks, strict=True)
    return KvShare(
        min(blocks), min(lendable), min(host_blocks), max(copy_seconds), max(staged_from)
    )


def pool_blocks(
    comm: Comm,
    model: Decoder,
    options: EngineOptions,
    step: LargestStep,
    block_bytes: int,
    room: Room,
) -> int:
    """rBlocks of the rank's pool, as many as are wanted or as there is memory for beside the
    largest `step`: `room` on the node, or what its GPU has free. Raises OptionError."""
    world, wanted = comm.world, wanted_bytes(options, block_bytes)
    if comm.device.place.type == "cpu":
        options = replace(options, dtype=dtype_name(model.dtype))
        if options.host_kv_path and in_memory(Path(options.host_kv_path)):
            options = replace(options, host_kv_path=None)
        memory = shard_memory(
            model.config, options, instances=world.instances, first=world.rank == 0, gpu=False
        )
        return Budget(memory, room).pool(wanted, block_bytes) // block_bytes
    if options.allow_gpu_sharing and wanted is None:
        raise OptionError(
            "ranks that share a GPU cannot see what the others will take: give --kv-memory or "
            "--num-blocks with --allow-gpu-sharing"
        )
    peak = activation_peak(model, comm.device, step)
    peak += step.recorded * block_bytes  # beyond the pool, for padding rows
    free = free_memory(comm.device)
    return device_blocks(
        free, peak, options.gpu_memory_utilization, wanted, block_bytes, step.tokens
    )


def node_room(comm: Comm) -> Room:
    """This rank's part of its node's memory, beside the other ranks there. Collective."""
    world = comm.world
    ranks = [
        Seen(resident, given, [Limit(*limit) for limit in limits])
        for resident, given, limits in comm.share(look())
    ]
    node = world.nodes[world.rank]
    here = [seen for seen, place in zip(ranks, world.nodes, strict=True) if place == node]
    return room(ranks[world.rank], here)


def lone_room(comm: Comm) -> Room:
    """The same without hearing the others: as if every rank of the node had what this one has."""
    own = look()
    return room(own, [own] * comm.world.local_size)


def check_loading(comm: Comm, config: ModelConfig, options: EngineOptions, room: Room) -> None:
    """Check, before the weights are read, that this rank has room for its shard of the model
    `config` and all else. Raises OptionError if not."""
    if comm.device.place.type != "cpu":
        return
    world, lanes = comm.world, options.tensor_parallel_size
    memory = rank_memory(config, options, instances=world.size // lanes, first=world.rank == 0)
    block_bytes = options.block_size * config.shard(lanes).kv_bytes_per_token(
        dtype_of(config, options)
    )
    wanted = wanted_bytes(options, block_bytes)
    unused = wanted or block_bytes  # The pool comes after, and so do the steps.
    reading = loading_memory(config, options) - unused
    Budget(memory._replace(steps=max(memory.steps, reading)), room).pool(wanted, block_bytes)


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


def tier_blocks(
    comm: Comm, memory: int | None, path: str | None, block_bytes: int, room: Room
) -> int:
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
    if (path is None or in_memory(Path(path))) and memory > room.left:
        raise OptionError(
            f"--host-kv-memory gives {memory} bytes to a rank, but {room.limit.name} leaves "
            f"{room.left} to each of {room.sharing} ranks: give less, or --host-kv-path on a disk "
            "of the node"
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


def mapped_memory(size: int, folder: Path) -> torch.Tensor:
    """`size` bytes, uint8, of a file in `folder` that no other process sees. It has no name (or
    loses it at once), so it is gone when the process is, however that ends. Its space is reserved
    here: a write that finds a disk full would kill the process. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder, prefix="hpc-distkv-kv-") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
