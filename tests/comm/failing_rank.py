"""Ranks that fail in one way each, under mpirun: `failing_rank.py WAY`."""

from __future__ import annotations

import sys
import threading
import time

import torch
from letters import take

from hpc_distkv.comm import abort, stall
from hpc_distkv.comm.mpi.start import open_mpi
from hpc_distkv.comm.transport import Comm


def wait_for_all(comm: Comm) -> None:
    comm.agree(None)


def exception(comm: Comm) -> None:
    if comm.world.rank == 1:
        raise ValueError("rank one has had enough")
    wait_for_all(comm)


def thread(comm: Comm) -> None:
    if comm.world.rank == 1:
        other = threading.Thread(target=lambda: 1 // 0)
        other.start()
        time.sleep(60)
    wait_for_all(comm)


def leaves_too_early(comm: Comm) -> None:
    """With status 0, while others still expect its tensors."""
    if comm.world.rank != 1:
        comm.transport.exchange([], [(1, torch.zeros(4))]).wait("the tensor that never comes")


def sleeps_in_round(comm: Comm) -> None:
    if comm.world.rank == 2:
        time.sleep(60)
    wait_for_all(comm)


def sleeps_as_first(comm: Comm) -> None:
    if comm.world.rank == 0:
        time.sleep(60)
    wait_for_all(comm)


def sleeps_in_step(comm: Comm) -> None:
    if comm.world.rank == 2:
        time.sleep(60)
    elif comm.world.rank == 1:
        comm.transport.exchange([], [(2, torch.zeros(4))]).wait("queries, layer 3")
    else:
        comm.mail.post(0, b"here")
        take(comm, [0, 2], "headers of step 5")


def sleeps_in_call(comm: Comm) -> None:
    """Others wait for it in a call that cannot be polled."""
    if comm.world.rank == 2:
        time.sleep(60)
    with abort.guarded(comm, "NCCL to connect its GPU", [0, 1, 2]):
        time.sleep(60)


def agreed(comm: Comm) -> None:
    """All leave together with the status of a usage error."""
    said = comm.agree("no such file" if comm.world.rank == 1 else None)
    comm.close()
    if any(said):
        if comm.world.rank == 0:
            print(said, file=sys.stderr)
        sys.exit(2)


def rows_failed(comm: Comm) -> None:
    """Rank 0 alone leaves with status 1, after all are done."""
    wait_for_all(comm)
    comm.close()
    if comm.world.rank == 0:
        sys.exit(1)


if __name__ == "__main__":
    way = sys.argv[1]
    stalls = way.startswith(("sleeps", "leaves"))
    stall.HEARING, stall.UNHEARD = 0.7, 1.5
    with abort.aborting(open_mpi(stall_timeout=1.0 if stalls else 30.0)) as comm:
        globals()[way](comm)
