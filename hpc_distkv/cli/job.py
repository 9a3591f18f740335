"""What the commands that run on all ranks have in common. Imported when a run starts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click

from hpc_distkv.cli.options import engine_settings
from hpc_distkv.comm.abort import aborting, last_words
from hpc_distkv.comm.mpi.start import open_mpi
from hpc_distkv.comm.together import SetupError, together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import ExplainedError
from hpc_distkv.printable import LAYOUT, printable
from hpc_distkv.ranks.interrupt import ignore_signals
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.units import stamped

FAREWELL = 1.0
"""Seconds that a process needs to end after MPI's farewell."""


def in_world(stall_timeout: float, work: Callable[[Comm], int]) -> NoReturn:
    """Start MPI, run `work` on this rank and exit together; rank 0's status is the job's."""
    with aborting(open_mpi(stall_timeout)) as comm:
        try:
            status = work(comm)
        except Exception as error:
            if error is not comm.agreed and not isinstance(error, SetupError):
                raise
            status = _told(comm, error)
        comm.close()
        if comm.world.size > 1:
            leave_in_turn(comm.world.rank, status)
        sys.exit(status)


def _told(comm: Comm, error: Exception) -> int:
    """The status for what all ranks raise together: said by the first one, or by the rank that is
    at fault if it is a bug."""
    if isinstance(error, ExplainedError):
        say(comm, stamped(f"Error: {error}"))
        return error.exit_code
    click.echo(stamped(printable(last_words(error), keep=LAYOUT)), err=True)
    return os.EX_SOFTWARE


def leave_in_turn(rank: int, status: int) -> None:
    """Let the other ranks leave before the first one, if that has a status other than 0: launchers
    end what is left of a job then, and the job would seem to be killed. It takes the interpreter
    its time to end, so signals no longer count."""
    from mpi4py import MPI

    MPI.Finalize()
    ignore_signals()
    if status and rank == 0:
        time.sleep(FAREWELL)


def say(comm: Comm, text: str) -> None:
    """Print on stderr, from rank 0 only."""
    if comm.world.rank == 0:
        click.echo(printable(text, keep=LAYOUT), err=True)


def set_options(comm: Comm, options: dict[str, Any]) -> EngineOptions:
    """The engine options among a command's options. Collective. Raises SetupError."""
    return together(comm, lambda: engine_settings(options))
