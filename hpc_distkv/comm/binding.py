"""Gives every rank its device."""

from __future__ import annotations

from hpc_distkv.comm.device import DeviceError, Sight, fault, own_index
from hpc_distkv.comm.transport import Comm

GPU_EAGER_SECONDS = 0.1
"""How long a rank with a core and a GPU of its own polls before it sleeps: a step of the GPU. The
host has nothing better to do, and the GPU idles for as long as a sleep is too long."""


def bind(comm: Comm, wanted: str = "auto", sharing: bool = False) -> None:
    """Choose this rank's device and move its tensors by way of the host: `wanted` is one of
    `device.CHOICES`, `sharing` lets ranks share a GPU. Collective, before tensors are exchanged; a
    second call changes nothing. Raises DeviceError, on all ranks unless a device is broken."""
    from hpc_distkv.comm.cuda import Cuda, look
    from hpc_distkv.comm.staged import StagedTransport

    world = comm.world
    sight = look(wanted, world.local_rank)
    problem = fault([Sight(*seen) for seen in comm.share(sight)], world, wanted, sharing)
    if problem:
        raise DeviceError(problem)
    if not sight.uuid or isinstance(comm.device, Cuda):
        return
    comm.device = device = Cuda(own_index(sight.devices, world.local_rank))
    comm.transport = staged = StagedTransport(comm.transport, device, comm.waiter)
    comm.waiter.background.append(staged.push)
    if world.cores >= 1:
        comm.waiter.eager = GPU_EAGER_SECONDS
