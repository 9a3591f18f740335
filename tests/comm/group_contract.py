"""What collectives within an instance and along a lane keep to, whatever carries them. Each
function is run by all ranks.

As a script (under mpirun, with the number of ranks per instance) runs all of them over MPI.
"""

from __future__ import annotations

import sys

import torch

from hpc_distkv.comm.collective.broadcast import LaneBroadcast
from hpc_distkv.comm.collective.group import DIRECT_BYTES, Group
from hpc_distkv.comm.transport import Comm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def part(lane: int, instance: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * instance + lane)
    return torch.randn(shape, generator=generator)


def totals_are_float32_sums_in_the_order_of_lanes(comm: Comm) -> None:
    world, group = comm.world, Group(comm)
    large = DIRECT_BYTES // 40
    shapes = [(1, 7), (3, 5), (1, 1), (large, 11), (2 * large + 1, 13), (2, 3), (0, 4)]
    for step, shape in enumerate(shapes):
        for dtype in DTYPES:
            parts = [part(lane, world.instance, step, shape).to(dtype) for lane in range(world.tp)]
            expected = parts[0].float()
            for other in parts[1:]:
                expected = expected + other.float()
            x = parts[world.lane].clone()
            assert group.total(x) is x
            assert torch.equal(x, expected.to(dtype))


def parts_are_joined_on_lane_0(comm: Comm) -> None:
    world, group = comm.world, Group(comm)
    for step, rows in enumerate((1, 4, 3000)):
        widths = [3 + lane % 2 for lane in range(world.tp)]
        parts = [
            part(lane, world.instance, step, (rows, width)) for lane, width in enumerate(widths)
        ]
        own = parts[world.lane]
        joined = group.joined(own, widths)
        assert torch.equal(joined, own if world.lane else torch.cat(parts, dim=1))


def the_first_instance_is_heard_along_each_lane(comm: Comm) -> None:
    world, relay = comm.world, LaneBroadcast(comm)
    assert relay.reads == (world.instance == 0)
    for step, size in enumerate((1, 100_000, 3)):
        tensor = part(world.lane, world.instance, step, (size,))
        relay.broadcast(tensor)
        assert torch.equal(tensor, part(world.lane, 0, step, (size,)))


CONTRACT = (
    totals_are_float32_sums_in_the_order_of_lanes,
    parts_are_joined_on_lane_0,
    the_first_instance_is_heard_along_each_lane,
)


def main() -> None:
    from hpc_distkv.comm.abort import aborting
    from hpc_distkv.comm.mpi.start import open_mpi

    with aborting(open_mpi(stall_timeout=20.0, tp=int(sys.argv[1]))) as comm:
        for promise in CONTRACT:
            promise(comm)
            comm.share(None)
            if comm.world.rank == 0:
                print(f"kept: {promise.__name__}", flush=True)


if __name__ == "__main__":
    main()
