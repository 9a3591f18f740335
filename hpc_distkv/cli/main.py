"""Where the `hpc-distkv` process begins and ends; it imports little before it hears signals."""

from __future__ import annotations

import logging
import os
import signal
import sys

from hpc_distkv.cli.streams import LOG_PATIENCE, close_streams, open_streams, shown
from hpc_distkv.comm.mpi.launch import first_rank, leave_together
from hpc_distkv.errors import INTERRUPTED_STATUS
from hpc_distkv.printable import LAYOUT, PrintableFormatter, printable
from hpc_distkv.ranks.interrupt import SIGNALS, ignore_signals
from hpc_distkv.units import CLOCK

LOG_LINE = "%(asctime)s  %(levelname)s %(name)s: %(message)s"


def main() -> None:
    """Run a command, and leave with its status.

    What `generate` prints is a log: no failure of that changes what becomes of the rows, and a
    signal stops it in time from now on. All other commands are for what they print.
    """
    generates = sys.argv[1:2] == ["generate"]
    arrived: list[int] = []
    if generates:
        for number in SIGNALS:
            signal.signal(number, lambda number, _: arrived.append(number))
    streams = open_streams(LOG_PATIENCE if generates else None)
    try:
        status: str | int | None = _run(arrived)
    except SystemExit as leaving:
        status = leaving.code
    ignore_signals()  # the status is settled
    close_streams(*streams)
    sys.exit(status if generates else shown(status, streams[0]))


def _run(arrived: list[int]) -> int:
    """The status of a command. What a user gets wrong is said once, by the first rank; a fault
    leaves with its own status, since 1 means rows that are errors."""
    try:
        _begin_log()
        import click

        from hpc_distkv.cli.group import group

        try:
            group.main(standalone_mode=False, obj=arrived)
        except click.ClickException as error:
            error.message = printable(error.message, keep=LAYOUT)  # type: ignore[misc]
            if first_rank():
                error.show()
            leave_together()
            return error.exit_code
        except click.Abort:
            return INTERRUPTED_STATUS
    except SystemExit:
        raise
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except BaseException:
        import traceback

        print(printable(traceback.format_exc(), keep=LAYOUT), file=sys.stderr)
        return os.EX_SOFTWARE
    return 0


def _begin_log() -> None:
    """What any module logs is printable, and says when."""
    log = logging.StreamHandler()
    log.setFormatter(PrintableFormatter(LOG_LINE, datefmt=CLOCK))
    logging.basicConfig(handlers=[log], level=logging.WARNING)
