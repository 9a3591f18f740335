"""`hpc-distkv env`: where a job would run."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from hpc_distkv.cli.options import Number
from hpc_distkv.comm.mpi.launch import first_rank, leave_together
from hpc_distkv.comm.mpi.library import LaunchError
from hpc_distkv.observe.environment import (
    Facts,
    counted,
    device_of,
    facts,
    launcher,
    link_classes,
    problems,
    slurm,
)
from hpc_distkv.printable import printable

if TYPE_CHECKING:
    from hpc_distkv.comm.collective.probe import LinkCosts
    from hpc_distkv.comm.transport import Comm

QUERY_BYTES, BLOCK_BYTES = 4 << 10, 4 << 20
MOST_IN_A_TABLE = 16
"""Ranks beyond which only a summary of links is shown, not every pair."""
MOST_LISTED = 64
"""Ranks that are listed."""


@click.command("env")
@click.option(
    "--stall-timeout",
    type=Number(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which a link that does not answer is named.",
)
def command(stall_timeout: float) -> None:
    """Show MPI, launcher, nodes, cores, GPUs and versions, and measure every link once.

    Start it as the job: under srun or mpirun with the same options, or alone. Says what looks
    wrong. For a bug report, paste all it prints.
    """
    own = facts()
    try:
        from hpc_distkv.comm.mpi.start import open_mpi

        comm = open_mpi(stall_timeout)
    except (LaunchError, ImportError) as error:
        if first_rank():
            _show([*_head(own), f"MPI       does not work{_not_started()}", ""])
            _show(_places([own], [0], [1]))
            _show(_verdict([str(error), *problems([own], [0], [0], [])]))
        sys.exit(LaunchError.exit_code if leave_together() else 0)
    _in_world(comm, own)


def _not_started() -> str:
    """The library that would start if the launcher were another one."""
    from hpc_distkv.comm.mpi.library import load_library

    try:
        return f": {load_library().name}"
    except LaunchError:
        return ""


def _in_world(comm: Comm, own: Facts) -> None:
    import msgspec

    from hpc_distkv.comm.abort import aborting
    from hpc_distkv.comm.binding import bind
    from hpc_distkv.comm.collective.probe import probe
    from hpc_distkv.comm.device import DeviceError
    from hpc_distkv.comm.mpi.library import load_library

    with aborting(comm):
        own.versions["MPI"] = load_library().name
        ranks = [
            msgspec.msgpack.decode(each, type=Facts)
            for each in comm.gather(msgspec.msgpack.encode(own))
        ]
        fault = None
        try:
            bind(comm)
        except DeviceError as error:
            fault = str(error)
        links = probe(comm, QUERY_BYTES, BLOCK_BYTES)
        if comm.world.rank == 0:
            _show(_report(comm, ranks, links, fault))
        comm.close()


def _report(
    comm: Comm, ranks: Sequence[Facts], links: LinkCosts | None, fault: str | None
) -> Iterable[str]:
    world = comm.world
    local = [world.nodes[:rank].count(node) for rank, node in enumerate(world.nodes)]
    sizes = [world.nodes.count(node) for node in world.nodes]
    yield from _head(ranks[0])
    yield f"MPI       {ranks[0].versions['MPI']}"
    nodes = counted(max(world.nodes) + 1, "node")
    yield f"ranks     {world.size} on {nodes}"
    yield ""
    yield from _places(ranks, local, sizes)
    if links and world.size > 1:
        yield ""
        yield f"tensors travel {_way(comm)}"
        yield from _links(world.nodes, links)
    trips = links.round_trip if links else []
    yield from _verdict(problems(ranks, local, world.nodes, trips, fault))


def _way(comm: Comm) -> str:
    from hpc_distkv.comm.gpu.meeting_transport import MeetingTransport
    from hpc_distkv.comm.gpu.staged import StagedTransport

    if isinstance(comm.transport, MeetingTransport):
        return "from GPU to GPU, by NCCL"
    return f"by MPI{', GPUs by way of the host' * isinstance(comm.transport, StagedTransport)}"


def _head(own: Facts) -> Iterable[str]:
    versions = [f"{name} {number}" for name, number in own.versions.items() if name != "MPI"]
    yield f"system    {platform.system()} {platform.release()} {platform.machine()}"
    yield f"versions  {', '.join(versions)}"
    yield f"launcher  {launcher()}"
    yield f"Slurm     {slurm() or 'no job'}"


def _places(ranks: Sequence[Facts], local: Sequence[int], sizes: Sequence[int]) -> Iterable[str]:
    width = max(len(rank.host) for rank in ranks)
    yield f"rank  {'node':{width}}  place  cores              GPU"
    for number, rank in enumerate(ranks[:MOST_LISTED]):
        device = device_of(rank, local[number])
        gpu = f"{device.name}, {device.gib} GiB, {device.uuid}" if device else "none"
        seen = f" ({len(rank.devices)} visible)" if len(rank.devices) > 1 else ""
        if rank.visible is not None:
            seen += f" CUDA_VISIBLE_DEVICES={rank.visible}"
        place = f"{local[number]} of {sizes[number]}"
        cores = f"{len(rank.cores)}: {_ranges(rank.cores)}"
        yield f"{number:4}  {rank.host:{width}}  {place:>6}  {cores:17}  {gpu}{seen}"
    if len(ranks) > MOST_LISTED:
        yield f"      … and {len(ranks) - MOST_LISTED} more"


def _links(nodes: Sequence[int], links: LinkCosts) -> Iterable[str]:
    yield f"round trips of {QUERY_BYTES >> 10} KiB, and bandwidth of {BLOCK_BYTES >> 20} MiB blocks"
    bandwidths = link_classes(nodes, links.bandwidth)
    for where, pairs in link_classes(nodes, links.round_trip).items():
        micros = [1e6 * seconds for seconds in pairs.values()]
        rates = [1e-9 * rate for rate in bandwidths[where].values()]
        yield (
            f"  {where:14} {_spread(micros, '.1f')} µs   {_spread(rates, '.2f')} GB/s   "
            f"({counted(len(pairs), 'pair')})"
        )
    if 2 < len(nodes) <= MOST_IN_A_TABLE:
        yield "  µs    " + "".join(f"{rank:8}" for rank in range(len(nodes)))
        for rank, row in enumerate(links.round_trip):
            cells = [f"{1e6 * cost:8.1f}" if cost else "       –" for cost in row]
            yield f"  {rank:4}  " + "".join(cells)


def _spread(values: Sequence[float], style: str) -> str:
    least, median, most = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{median:{style}}"
    return f"{least:{style}} – {median:{style}} – {most:{style}}"


def _verdict(found: Sequence[str]) -> Iterable[str]:
    yield ""
    if not found:
        yield "Nothing looks wrong."
    for problem in found:
        yield f"LOOKS WRONG  {' '.join(problem.split())}"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,8-11."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(printable(line.rstrip()))
