"""Ranks over MPI. MPI starts in `open_mpi`; importing this module does not touch it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hpc_distkv.comm.mpi.launch import check_launch, prepare_launch
from hpc_distkv.comm.mpi.library import load_library
from hpc_distkv.comm.transport import Comm
from hpc_distkv.comm.waiter import Waiter, eagerness
from hpc_distkv.comm.world import World

if TYPE_CHECKING:
    from mpi4py import MPI


def open_mpi(stall_timeout: float, tp: int = 1) -> Comm:
    """Start MPI and connect this rank with the others. A process without a launcher is a world of
    one. Collective.

    `stall_timeout` is in seconds, `tp` the number of ranks per instance. Raises LaunchError if
    there is no MPI library or it does not match the launcher, ValueError if the ranks cannot be
    cut into instances.
    """
    library = start_mpi()
    from mpi4py import MPI

    from hpc_distkv.comm.mpi.mail import MpiMail
    from hpc_distkv.comm.mpi.rounds import MpiRounds
    from hpc_distkv.comm.mpi.transport import MpiTransport

    everyone = MPI.COMM_WORLD
    check_launch(everyone.Get_size(), library, os.environ)
    world = discover(everyone, tp)
    waiter = Waiter(world, stall_timeout, eagerness(world))
    # One clone per purpose: messages of one cannot meet receives of another, and collectives need
    # the same order on all ranks only within their own clone.
    transport = MpiTransport(everyone.Dup(), waiter)
    mail = MpiMail(everyone.Dup(), waiter)
    rounds = MpiRounds(everyone.Dup(), everyone.Dup(), waiter)
    waiter.always(rounds.poke, mail.poke)
    complaints = MpiMail(everyone.Dup(), waiter)

    def abort(status: int) -> None:
        everyone.Abort(status)
        os._exit(status)  # MPICH returns from Abort and waits to be killed

    def new_mail() -> MpiMail:
        another = MpiMail(everyone.Dup(), waiter)
        waiter.always(another.poke)
        return another

    return Comm(world, transport, mail, rounds, waiter, abort, new_mail, complaints)


def start_mpi() -> str:
    """Load and initialise MPI for calls from one thread (an abort may come from another); returns
    the library's name and version. Raises LaunchError."""
    library = load_library()
    from mpi4py import MPI

    if not MPI.Is_initialized():
        prepare_launch(library, os.environ)
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
    return library.name


def discover(everyone: MPI.Comm, tp: int) -> World:
    """Which ranks there are and which of them share a node. Collective."""
    from mpi4py import MPI

    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    first_on_node = node.bcast(everyone.Get_rank())
    node.Free()
    mine = sum(1 << core for core in os.sched_getaffinity(0))
    places = everyone.allgather((first_on_node, MPI.Get_processor_name(), mine))
    numbers = {first: number for number, first in enumerate(sorted({p[0] for p in places}))}
    sharers = sum(first == first_on_node and bool(cores & mine) for first, _, cores in places)
    return World(
        rank=everyone.Get_rank(),
        nodes=tuple(numbers[first] for first, _, _ in places),
        tp=tp,
        hosts=tuple(host for _, host, _ in places),
        cores=mine.bit_count() / sharers,
    )
