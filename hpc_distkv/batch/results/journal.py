"""The results file while a run appends to it: what a kill leaves of it can be resumed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from typing import NoReturn

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.results.answered import Answered
from hpc_distkv.batch.results.claim import Claim
from hpc_distkv.batch.results.order import InputOrder, order_lines
from hpc_distkv.batch.results.side_files import unfinished_path
from hpc_distkv.batch.results.unfinished import AnswerKey, Begun, write_unfinished
from hpc_distkv.regular import remove_file

_BUFFER = 1 << 20
"""Bytes kept in memory before they are written out of turn."""


class Journal:
    """Owner of the results file. Lines are safe from kill -9 once written, which `commit` does.

    Beside the file lie (`side_files`)
    `<output>.meta.json`, written before the first row: the fingerprint of the job. A rerun with
    another fingerprint is refused, so one file never mixes two jobs;
    `<output>.unfinished.jsonl`, after a run that was stopped early: what it had begun;
    `<output>.claim`, during a run: see `Claim`.
    """

    def __init__(
        self,
        claim: Claim,
        fd: int,
        size: int,
        answered: Answered,
        unfinished: Mapping[AnswerKey, Begun],
    ) -> None:
        self.path = claim.output
        self.answered = answered
        """What was in the file when it was opened."""
        self.unfinished = unfinished
        """What an earlier run has begun."""
        self.broken = False
        """Whether nothing more can be written."""
        self._claim = claim
        self._fd: int | None = fd
        """None once it is closed, which is so too when another run may have the file."""
        self._buffer = bytearray()
        self._written = size
        self._synced = size
        self._sync_error: OSError | None = None

    def append(self, line: bytes) -> None:
        """Add one line, given without its newline, unless the journal is `broken`. Raises
        JournalError when the disk refuses."""
        assert not self.broken
        assert b"\n" not in line
        self._buffer += line
        self._buffer += b"\n"
        if len(self._buffer) >= _BUFFER:
            self.write()

    def write(self) -> None:
        """Hand everything appended so far to the operating system: it survives this process, but
        not a power failure. Raises JournalError, also where an earlier `sync` has failed."""
        self._raise_failed_sync()
        if self.broken or not self._buffer:
            return
        assert self._fd is not None
        try:
            self._check_alone()
            rest = memoryview(self._buffer)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            self._fail(error, keep=self._written)
        self._written += len(self._buffer)
        self._buffer = bytearray()

    def sync(self) -> None:
        """Put what was written on the disk (fsync). May run in a thread of its own beside all
        else, so it leaves a failure for `write` to raise."""
        fd, written = self._fd, self._written
        if fd is None or self.broken or self._synced == written:
            return
        try:
            os.fsync(fd)
        except OSError as error:
            self._sync_error = error
        else:
            self._synced = written

    def commit(self) -> None:
        """Put everything appended so far on the disk (write and fsync). Raises JournalError."""
        self.write()
        self.sync()
        self._raise_failed_sync()

    def save_unfinished(self, begun: Collection[Begun]) -> None:
        """Replace the saved answers of unfinished rows by `begun`, unless another run may have the
        file. Works after a failed write too. Raises JournalError."""
        if self._fd is None:
            return
        place = unfinished_path(self.path)
        try:
            self._check_alone()
            if begun:
                write_unfinished(place, begun)
            else:
                remove_file(place)
        except OSError as error:
            raise JournalError(
                f"cannot keep what was begun in {place}: {error.strerror}. The results so far are "
                "safe; a rerun computes the rows that were not finished from an earlier state."
            ) from error

    def close(self, order: InputOrder | None = None) -> None:
        """Commit and close, and put the lines into an order if one is given; only close after a
        failure. Raises JournalError."""
        try:
            if self.broken or self._fd is None:
                return
            self.commit()
            self._check_alone()
            if order:
                self._put_in_order(order)
        finally:
            self._abandon()

    def release(self) -> None:
        """Let other runs write, however this one ended."""
        self._claim.release()

    def _put_in_order(self, order: InputOrder) -> None:
        try:
            order_lines(self.path, order)
        except OSError as error:
            raise JournalError(
                f"all rows are in {self.path}, but cannot be put in order: "
                f"{error.strerror or error}."
            ) from error

    def _check_alone(self) -> None:
        """Raise JournalError if the file was moved or removed, where lines would be lost, or if
        another run writes to it, so that rows would be answered twice."""
        assert self._fd is not None
        try:
            self._check_place(self._fd)
            self._claim.check()
        except JournalError:
            self.broken = True
            self._abandon()
            raise

    def _check_place(self, fd: int) -> None:
        ours = os.fstat(fd)
        try:
            there = os.path.samestat(ours, self.path.stat())
        except OSError:
            there = False
        if not there:
            raise JournalError(
                f"{self.path} was moved or removed by somebody else during the run, which ends "
                "here. Put it back, with what lies beside it, and rerun the same command to resume."
            )
        if ours.st_size != self._written:
            raise JournalError(
                f"{self.path} was changed by somebody else during the run; is the same job running "
                "twice? Stop the other one and rerun the same command to resume."
            )

    def _raise_failed_sync(self) -> None:
        if self._sync_error and not self.broken:
            self._fail(self._sync_error, keep=self._synced)

    def _fail(self, error: OSError, keep: int) -> NoReturn:
        assert self._fd is not None
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, keep)
            self._written = keep
        self._buffer = bytearray()
        self.broken = True
        raise JournalError(
            f"cannot write results to {self.path}: {error.strerror}. The results so far are safe; "
            "make room and rerun the same command to resume."
        ) from error

    def _abandon(self) -> None:
        """Close, and let other runs write."""
        self._buffer = bytearray()
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._claim.release()
