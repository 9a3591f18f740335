"""Standard output and standard error, where no failure of theirs ends what a job is about."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import sys
from typing import TextIO

LOG_PATIENCE = 10.0
"""Seconds for which a job waits for a full pipe to be read; then its log has a gap."""


class Stream(io.FileIO):
    """What is behind a text stream. A write that fails raises nothing: its lines are lost, and the
    next one that succeeds says how many."""

    def __init__(self, fd: int, patience: float | None) -> None:
        """`patience`: seconds for which a reader may keep it waiting; None: for ever."""
        super().__init__(fd, "w", closefd=False)
        self._patience = patience
        self._unsaid = 0
        self._torn = False
        self.lost = 0
        """Lines that could not be written."""
        self.error: OSError | None = None
        """Why: of the last one."""

    def write(self, data: object) -> int:
        """Write all, or count it as lost."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            if self._unsaid:
                self._put(memoryview(self._gap()))
                self._unsaid = 0
            self._put(view)
        except OSError as error:
            self.error = error
            lines = max(1, bytes(view).count(b"\n"))
            self._unsaid += lines
            self.lost += lines
        return len(view)

    def _gap(self) -> bytes:
        why = self.error.strerror if self.error else ""
        start = "\n" if self._torn else ""
        return f"{start}[lines lost here: {self._unsaid} ({why})]\n".encode()

    def _put(self, view: memoryview) -> None:
        """Pieces of which a pipe that has room for some takes each as a whole, without waiting."""
        while view:
            self._wait()
            written = super().write(view[: select.PIPE_BUF]) or 0
            if written:
                self._torn = view[written - 1] != ord("\n")
            view = view[written:]

    def _wait(self) -> None:
        """Return when there is room. Raises TimeoutError: at once where lines were lost before."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        patience = 0.0 if self._unsaid and self._patience is not None else self._patience
        if not poll.poll(None if patience is None else 1000 * patience):
            raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")


def fill_descriptors() -> None:
    """Where a standard descriptor is closed, nothing else may come to have its number: neither the
    results nor MPI's connections. Reads end at once and writes fail."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def open_streams(patience: float | None) -> tuple[Stream, Stream]:
    """Put streams that raise nothing in the place of `sys.stdout` and `sys.stderr`."""
    fill_descriptors()
    out, err = Stream(1, patience), Stream(2, patience)
    sys.stdout = _text(out, sys.stdout, lines=False)
    sys.stderr = _text(err, sys.stderr, lines=True)
    return out, err


def close_streams(out: Stream, err: Stream) -> None:
    """Write what is left, and say of each stream, on the other one, what it has lost."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # somebody has closed it
            stream.flush()
    for name, stream, other in (("output", out, sys.stderr), ("error", err, sys.stdout)):
        if stream.error and stream.error.errno != errno.EPIPE:
            with contextlib.suppress(ValueError):
                why = stream.error.strerror
                other.write(f"lines lost on standard {name}: {stream.lost} ({why})\n")
                other.flush()


def shown(status: str | int | None, out: Stream) -> str | int | None:
    """The exit status of a command whose purpose is what it prints: not success if that is lost.
    Where the reader has gone, that of a program that was ended by SIGPIPE."""
    if out.error is None or status not in (None, 0):
        return status
    return 128 + signal.SIGPIPE if out.error.errno == errno.EPIPE else os.EX_SOFTWARE


def _text(raw: Stream, old: TextIO | None, lines: bool) -> TextIO:
    return io.TextIOWrapper(
        raw,  # which writes all that it is given
        encoding=old.encoding if old else "utf-8",
        errors="backslashreplace",
        line_buffering=lines or (old is not None and old.isatty()),
        write_through=getattr(old, "write_through", False),
    )
