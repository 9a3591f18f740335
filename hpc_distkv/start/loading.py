"""What a rank has before its engine: a device, cores, a place in an instance, and its shard."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_distkv.comm import binding
from hpc_distkv.comm.collective.broadcast import LaneBroadcast
from hpc_distkv.comm.collective.group import Group
from hpc_distkv.comm.together import together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.shard import ModelShard
from hpc_distkv.model.weights import load_decoder, random_decoder
from hpc_distkv.start.capacity import check_loading, node_room
from hpc_distkv.start.options import EngineOptions


def open_model(
    comm: Comm, path: str | Path, config: ModelConfig, options: EngineOptions
) -> Decoder:
    """Choose every rank's device and load its shard of the decoder in model directory `path`.
    Collective. Raises SetupError on all ranks if one cannot, and NcclError."""
    together(comm, lambda: bind(comm, options))
    room = node_room(comm)

    def load() -> Decoder:
        check_loading(comm, config, options, room)
        return load_model(comm, path, config, options)

    decoder = together(comm, load)
    unite(comm)
    return decoder


def bind(comm: Comm, options: EngineOptions) -> None:
    """Choose every rank's device. Collective, before the model is loaded. Raises OptionError,
    DeviceError and NcclError."""
    binding.bind(comm, options.device, options.allow_gpu_sharing, options.transport)
    if comm.device.place.type != "cuda":
        for option, given in {
            "--transport nccl": options.transport == "nccl",
            "--allow-gpu-sharing": options.allow_gpu_sharing,
        }.items():
            if given:
                raise OptionError(f"{option} cannot be: it needs GPUs")


def unite(comm: Comm) -> None:
    """Connect the ranks of this rank's instance with each other. Collective over all ranks: after
    all have loaded their shards, for one that fails would keep the others waiting, and before pools
    take the memory that is left. Raises NcclError."""
    if comm.world.tp > 1:
        comm.transport.unite(comm)


def load_model(
    comm: Comm, path: str | Path, config: ModelConfig, options: EngineOptions
) -> Decoder:
    """Cut the ranks into instances, and load this rank's shard of the decoder in model directory
    `path`, which `config` describes. All ranks call it. Raises OptionError and ModelError."""
    try:
        comm.form_instances(options.tensor_parallel_size)
    except ValueError as error:
        raise OptionError(f"--tensor-parallel-size: {error}") from None
    set_threads(comm, options.threads)
    world = comm.world
    shard = ModelShard(world.lane, world.tp)
    dtype = None if options.dtype == "auto" else options.dtype
    try:
        if options.dummy:
            decoder = random_decoder(config, dtype, world.lane, comm.device.place, shard)
        else:
            relay = LaneBroadcast(comm) if options.load_format == "broadcast" else None
            decoder = load_decoder(path, config, dtype, comm.device.place, shard, relay)
    except torch.OutOfMemoryError as error:
        raise OptionError(
            "the GPU has no room for the weights: give more ranks to a replica "
            f"(--tensor-parallel-size, now {world.tp})"
        ) from error
    return decoder.among(Group(comm)) if world.tp > 1 else decoder


def set_threads(comm: Comm, threads: int | None) -> None:
    """Give torch `threads`, or this rank's share of the cores: launchers often leave it one, or
    all."""
    torch.set_num_threads(threads or max(1, int(comm.world.cores)))
