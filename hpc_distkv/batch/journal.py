"""The results file: appended to as rows finish, and enough to resume from after kill -9."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from hpc_distkv.batch.answered import Answered, read_answered
from hpc_distkv.batch.claim import Claim
from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.meta import (
    DROPPED,
    check_errors,
    check_meta,
    describe,
    differences,
    has_meta,
    note_meta,
    read_meta,
    write_meta,
)
from hpc_distkv.batch.replace import check_replaceable, real_path, remove_file
from hpc_distkv.batch.rewrite import drop_errors, order_lines
from hpc_distkv.batch.unfinished import Answer, Begun, read_unfinished, write_unfinished

_BUFFER = 1 << 20
"""Bytes kept in memory before they are written out of turn."""


class Journal:
    """Owner of the results file. Lines are safe from kill -9 once written, which `commit` does.

    Beside the file lie
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
        unfinished: dict[Answer, Begun],
    ) -> None:
        self.path = claim.output
        self.answered = answered
        """What was in the file when it was opened."""
        self.unfinished = unfinished
        """What an earlier run has begun."""
        self._claim = claim
        self._fd: int | None = fd
        self._buffer = bytearray()
        self._written = size
        self._synced = size

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], fingerprint: Mapping[str, Any], **options: Any
    ) -> Journal:
        """Start or resume the results file at `path`: see `prepare`."""
        return cls.prepare(path, fingerprint, **options)()

    @classmethod
    def prepare(
        cls,
        path: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        *,
        overwrite: bool = False,
        retry_errors: bool = False,
        source: str | os.PathLike[str] | None = None,
        errors: Path | None = None,
        job: str | None = None,
        restarted: bool = False,
        claim: Claim | None = None,
    ) -> Callable[[], Journal]:
        """Look whether the results file at `path` can be started or resumed, and change nothing
        but the claim; what is returned does it. So one file that is refused spoils no other.

        `overwrite` drops what the file holds, and `retry_errors` its error rows. `claim` is of this
        path and taken if it is not given; the journal releases it.

        `fingerprint` is everything that must be the same for old and new rows to belong
        together, as JSON values. `source`, the input, is protected from being overwritten;
        `errors`: the file of error rows, if they are kept apart; `job`: Slurm's id, if there is
        one: when it is `restarted`, it does not drop once more what it has made since it dropped
        what was there. Raises JournalError with what to do about it.
        """
        check_place(Path(path), source)
        wanted = describe(fingerprint, source, errors, job if overwrite or retry_errors else None)
        claim = claim or Claim.take(Path(path))
        path = claim.output
        with _used(path, claim):
            if restarted and has_meta(path) and read_meta(path).get(DROPPED) == job:
                overwrite = retry_errors = False
            if not overwrite:
                check_errors(path, wanted)
            empty = overwrite or not path.exists() or path.stat().st_size == 0
            if not empty:
                check_meta(path, wanted)
            answered, sound = (Answered(), 0) if empty else read_answered(path)
            same = not overwrite and has_meta(path) and not differences(path, wanted)
            unfinished = read_unfinished(unfinished_path(path)) if same else {}

        def begin() -> Journal:
            nonlocal answered, sound
            with _used(path, claim):
                # What is left of old rows goes before the new fingerprint comes: at no instant are
                # they together.
                if not same:
                    remove_file(unfinished_path(path))
                if retry_errors and answered.failed:
                    drop_errors(path, sound)
                    answered, sound = read_answered(path)
                if empty:
                    _empty(path)
                    write_meta(path, wanted)
                else:
                    note_meta(path, wanted)
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
                os.ftruncate(fd, sound)
                os.fsync(fd)
                return cls(claim, fd, sound, answered, unfinished)

        return begin

    def append(self, line: bytes) -> None:
        """Add one line, given without its newline. Raises JournalError when the disk refuses."""
        assert self._fd is not None
        assert b"\n" not in line
        self._buffer += line
        self._buffer += b"\n"
        if len(self._buffer) >= _BUFFER:
            self.write()

    def write(self) -> None:
        """Hand everything appended so far to the system, which outlives this process, but may lose
        power. Raises JournalError."""
        assert self._fd is not None
        if not self._buffer:
            return
        try:
            self._check_alone()
            rest = memoryview(self._buffer)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            self._fail(error, keep=self._written)
        self._written += len(self._buffer)
        self._buffer = bytearray()

    def commit(self) -> None:
        """Put everything appended so far on the disk (write and fsync). Raises JournalError."""
        assert self._fd is not None
        self.write()
        if self._synced < self._written:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._fail(error, keep=self._synced)
            self._synced = self._written

    def set_aside(self, begun: Collection[Begun]) -> None:
        """Keep what is begun for a rerun, instead of what was kept before. Raises JournalError."""
        self._claim.check()
        place = unfinished_path(self.path)
        try:
            if begun:
                write_unfinished(place, begun)
            else:
                remove_file(place)
        except OSError as error:
            raise JournalError(
                f"cannot keep what was begun in {place}: {error.strerror}. The results so far are "
                "safe; a rerun computes the rows that were not finished from an earlier state."
            ) from error

    def close(self, ordered: bool = False) -> None:
        """Commit and close, and put the lines into the order of the input if `ordered`; nothing to
        do after a failure. Raises JournalError."""
        if self._fd is None:
            return
        self.commit()
        os.close(self._fd)
        self._fd = None
        try:
            if ordered:
                self._claim.check()
                with _reported(f"all rows are in {self.path}, but cannot be put in order"):
                    order_lines(self.path)
        finally:
            self._claim.release()

    def release(self) -> None:
        """Let other runs write, however this one ended."""
        self._claim.release()

    def _check_alone(self) -> None:
        """Two runs on one file would answer rows twice; so would writing to a deleted one."""
        assert self._fd is not None
        try:
            self._claim.check()
        except JournalError:
            self._abandon()
            raise
        state = os.fstat(self._fd)
        if state.st_size == self._written and state.st_nlink > 0:
            return
        self._abandon()
        raise JournalError(
            f"{self.path} was changed or removed by somebody else during the run; is the same job "
            "running twice? Stop the other one and rerun the same command to resume."
        )

    def _fail(self, error: OSError, keep: int) -> NoReturn:
        assert self._fd is not None
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, keep)
        self._abandon()
        raise JournalError(
            f"cannot write results to {self.path}: {error.strerror}. The results so far are safe; "
            "make room and rerun the same command to resume."
        ) from error

    def _abandon(self) -> None:
        assert self._fd is not None
        self._buffer = bytearray()
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            os.close(fd)
        self._claim.release()


@contextlib.contextmanager
def _used(path: Path, claim: Claim) -> Iterator[None]:
    """The claim is released if the file cannot be used."""
    try:
        with _reported(f"cannot use {path} for the results"):
            yield
    except BaseException:
        claim.release()
        raise


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{what}: {error.strerror or error}.") from error


def unfinished_path(path: Path) -> Path:
    """Where lies what an earlier run of the results file at `path` has begun."""
    return path.with_name(path.name + ".unfinished.jsonl")


def check_place(path: Path, source: str | os.PathLike[str] | None) -> None:
    """Whether results could go to `path`, as far as a look can tell. Raises JournalError."""
    with _reported(f"cannot use {path} for the results"):
        _look_at(path, source)


def _look_at(path: Path, source: str | os.PathLike[str] | None) -> None:
    folder = real_path(path).parent
    if not folder.is_dir():
        raise JournalError(f"cannot use {path} for the results: there is no directory {folder}.")
    check_replaceable(path)
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise JournalError(f"{path} is both the input and the output; give another output.")


def _empty(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
