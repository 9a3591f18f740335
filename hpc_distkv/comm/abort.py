"""When one rank fails, the whole job ends: promptly, with a message and a status other than 0."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from hpc_distkv.comm.stall import agreed_words
from hpc_distkv.comm.transport import Comm
from hpc_distkv.comm.waiter import StallClock, StallError
from hpc_distkv.errors import INTERRUPTED_STATUS, ExplainedError
from hpc_distkv.printable import LAYOUT, printable
from hpc_distkv.units import stamped

GUARD_SECONDS = 0.1
"""Between two looks at whether a call that cannot be polled takes too long."""
WRITTEN = 5.0
"""Seconds for last words to be written."""
FORWARDED = 0.1
"""Seconds for the launcher to forward last words."""


@contextmanager
def aborting(comm: Comm) -> Iterator[Comm]:
    """Run a job so that no rank is left waiting for one that has gone.

    Leaving normally, by SystemExit(0), or with what all ranks raise together (`Comm.agreed`), waits
    for the other ranks (`Comm.close`). Any other exception, SystemExit with another status, and any
    exception in a thread ends all ranks, unless the ranks had closed together before: after
    `Comm.agree` and `Comm.close` each may leave as it likes.
    In a world of one, exceptions simply pass through.
    """
    if comm.world.size == 1:
        yield comm
        return
    previous_hook = threading.excepthook
    threading.excepthook = lambda args: end_job(comm, args.exc_value or args.exc_type())
    try:
        with failing(comm):
            try:
                yield comm
            except SystemExit as leaving:
                if comm.closed or exit_status(leaving) == 0:
                    comm.close()
                raise
            except BaseException as error:
                if error is comm.agreed:
                    comm.close()
                raise
            comm.close()
    finally:
        threading.excepthook = previous_hook


@contextmanager
def failing(comm: Comm) -> Iterator[None]:
    """Any exception in this block ends all ranks, but for what all of them raise together, and
    unless they have closed together. In a world of one, exceptions simply pass through."""
    try:
        yield
    except BaseException as error:
        if comm.world.size > 1 and not comm.closed and error is not comm.agreed:
            end_job(comm, error)
        raise


@contextmanager
def guarded(comm: Comm, what: str, awaited: Iterable[int]) -> Iterator[None]:
    """For calls in this block that wait for other ranks and cannot be polled: after the stall
    timeout the job ends, as by a StallError of any other wait. `what` names the calls, `awaited`
    are the ranks. The calls must let other threads run, and must not be MPI's."""
    over = threading.Event()

    def watch() -> None:
        clock = StallClock()
        while not over.wait(GUARD_SECONDS):
            if clock.look() > comm.stall_timeout:
                end_job(comm, comm.waiter.stall(what, lambda: awaited))
                return

    threading.Thread(target=watch, name=what, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def end_job(comm: Comm, error: BaseException) -> None:
    """Say why on stderr, if that can be written, then end all ranks."""
    try:
        _speak(comm, error)
    finally:
        comm.abort(exit_status(error))


def _speak(comm: Comm, error: BaseException) -> None:
    tag = f"[{comm.world.name(comm.world.rank)}] "
    words = agreed_words(comm, error) if isinstance(error, StallError) else last_words(error)
    lines = printable(words.rstrip("\n"), keep=LAYOUT).split("\n")
    # One write, every line tagged: the ranks' lines may mix, but stay readable.
    text = "".join(f"{stamped(tag + line)}\n" for line in lines)
    # In a thread, since nobody may read what stderr leads to.
    writer = threading.Thread(target=_write, args=(text,), daemon=True)
    writer.start()
    writer.join(WRITTEN)
    # A launcher that ends the job at once may drop what it has not forwarded yet.
    time.sleep(FORWARDED)


def _write(text: str) -> None:
    with contextlib.suppress(Exception):  # also where Python has no stderr
        sys.stderr.write(text)
        sys.stderr.flush()
        sys.stdout.flush()


def last_words(error: BaseException) -> str:
    """The message of an error that explains itself; message and traceback of a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        said = error.code if isinstance(error.code, str) else f"exit status {error.code}"
        return f"left before the other ranks were done: {said}"
    if isinstance(error, ExplainedError):
        return str(error)
    return f"{error}\n{''.join(traceback.format_exception(error))}"


def exit_status(error: BaseException) -> int:
    """The status with which the process would have left."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_STATUS
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, ExplainedError) else os.EX_SOFTWARE
