"""Gives every rank its device, and its tensors the way to those of other ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hpc_distkv.comm.device import DeviceError, Sight, fault, own_index
from hpc_distkv.comm.gpu import cuda, nccl
from hpc_distkv.comm.gpu.meeting_transport import MeetingTransport
from hpc_distkv.comm.gpu.staged import StagedTransport
from hpc_distkv.comm.transport import Comm

log = logging.getLogger(__name__)

GPU_EAGER_SECONDS = 0.1
"""How long a rank with a core and a GPU of its own polls before it sleeps: a step of the GPU. The
host has nothing better to do, and the GPU idles for as long as a sleep is too long."""


def bind(comm: Comm, wanted: str = "auto", sharing: bool = False, transport: str = "auto") -> None:
    """Choose this rank's device and how its tensors travel. Collective, before tensors are
    exchanged; a second call changes nothing.

    `wanted` is "auto", "cpu" or "cuda", `sharing` lets ranks share a GPU. `transport` is "nccl",
    "mpi" (by way of the host), or "auto": NCCL if there are several ranks, all have it, and each
    has a whole GPU to itself. Raises DeviceError, on all ranks, and NcclError.
    """
    world = comm.world
    sight = cuda.look(wanted, world.local_rank)
    sights = [Sight(*seen) for seen in comm.share(sight)]
    if problem := fault(sights, world, wanted, sharing):
        raise DeviceError(problem)
    if not sight.uuid or comm.device.place.type == "cuda":
        return
    by_nccl = _by_nccl(comm, transport, sights)
    device = _open(comm, own_index(sight.devices, world.local_rank))
    way: MeetingTransport | StagedTransport
    if by_nccl:
        fabric = nccl.Nccl(comm, range(world.size), cuda.new_stream(priority=-1))
        way = MeetingTransport(comm.transport, fabric, comm.new_mail(), comm.waiter)
    else:
        way = StagedTransport(comm.transport, device, comm.waiter)
    comm.compute_on(device, way, GPU_EAGER_SECONDS if world.cores >= 1 else None)


def _open(comm: Comm, index: int) -> cuda.Cuda:
    """CUDA device `index` of this node, if all ranks get theirs: to connect them makes each wait
    for all. Collective."""
    try:
        device, error = cuda.Cuda(index), None
    except DeviceError as problem:
        device, error = None, str(problem)
    for rank, said in enumerate(comm.agree(error)):
        if said is not None:
            raise DeviceError(f"{comm.world.name(rank)}: {said}")
    assert device is not None
    return device


def _by_nccl(comm: Comm, transport: str, sights: Sequence[Sight]) -> bool:
    """Whether tensors travel by NCCL: the same on all ranks. Collective."""
    if transport == "mpi" or (transport == "auto" and comm.world.size == 1):
        return False
    found = comm.share(nccl.usable())
    why_not = nccl.refusal([(version, why) for version, why in found])
    if len({seen.uuid for seen in sights}) < comm.world.size:
        why_not = "NCCL takes no two ranks on one GPU"
    elif transport == "auto" and any(seen.part for seen in sights):
        why_not = "NCCL is not sure to serve parts of GPUs (MIG); --transport nccl tries"
    if why_not and transport == "nccl":
        raise DeviceError(f"--transport nccl cannot be: {why_not}")
    if why_not and comm.world.rank == 0:
        log.warning("tensors of GPUs go by way of the host, which is slower: %s", why_not)
    return not why_not
