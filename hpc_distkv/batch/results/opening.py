"""Opening a results file: started anew, or resumed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpc_distkv.batch.answers.line import ResultLine, read_line
from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.results.answered import Answered, read_answered
from hpc_distkv.batch.results.claim import Claim
from hpc_distkv.batch.results.journal import Journal
from hpc_distkv.batch.results.meta import (
    DROPPED,
    check_errors,
    check_meta,
    describe,
    differences,
    note_meta,
    read_meta,
    write_meta,
)
from hpc_distkv.batch.results.side_files import (
    excess_of_name,
    meta_path,
    side_files,
    unfinished_path,
)
from hpc_distkv.batch.results.unfinished import AnswerKey, Begun, check_unfinished, read_unfinished
from hpc_distkv.regular import check_replaceable, real_path, remove_file, replace_file, same_file


class Reuse(NamedTuple):
    """Which of the lines in a results file are dropped."""

    overwrite: bool = False
    """All."""
    retry_errors: bool = False
    """Error rows, so that these rows are answered again."""
    job: str | None = None
    """Slurm's job id."""
    restarted: bool = False
    """Whether that job was started before. It drops lines at its first start only: it has made the
    others itself."""

    def after(self, before: Mapping[str, Any] | None) -> Reuse:
        """What is left to be dropped; `before`: the record of the job that wrote the file."""
        return Reuse() if self.restarted and before and before.get(DROPPED) == self.job else self


@dataclass(frozen=True)
class Opening:
    """A results file that was looked at. `look` changes nothing, `begin` does; so if one of a job's
    files is refused, the others are as they were."""

    claim: Claim
    wanted: Mapping[str, Any]
    """The record of this job."""
    same: bool
    """Whether this job wrote the file, and unfinished answers are kept."""
    empty: bool
    """Whether the file starts empty."""
    retry_errors: bool
    answered: Answered
    sound: int
    """Bytes of whole lines."""
    unfinished: Mapping[AnswerKey, Begun]

    @classmethod
    def look(
        cls,
        claim: Claim,
        fingerprint: Mapping[str, Any],
        reuse: Reuse,
        source: Path | None = None,
        errors: Path | None = None,
    ) -> Opening:
        """`fingerprint`: all that must be the same in the runs of a job, as JSON values; `source`:
        the input; `errors`: the file of error rows, if they are not among the results. Raises
        JournalError, which says what to do."""
        path = claim.output
        drops = reuse.overwrite or reuse.retry_errors
        wanted = describe(fingerprint, source, errors, reuse.job if drops else None)
        with _usable(path):
            before = read_meta(path) if meta_path(path).exists() else None
            reuse = reuse.after(before)
            if before and not reuse.overwrite:
                check_errors(path, before, wanted)
            empty = reuse.overwrite or not path.exists() or path.stat().st_size == 0
            if not empty:
                check_meta(path, before, wanted)
            answered, sound = (Answered(), 0) if empty else read_answered(path)
            same = bool(before and not reuse.overwrite and not differences(before, wanted))
            begun = unfinished_path(path)
            unfinished = read_unfinished(begun) if same else check_unfinished(begun)
        return cls(claim, wanted, same, empty, reuse.retry_errors, answered, sound, unfinished)

    def begin(self, changed: Collection[str] = ()) -> Journal:
        """The journal, which releases the claim. Lines of the custom_ids `changed` are dropped.
        Raises JournalError."""

        def drop(line: ResultLine) -> bool:
            return (self.retry_errors and line.failed) or (line.named and line.custom_id in changed)

        path, answered, sound = self.claim.output, self.answered, self.sound
        with _usable(path):
            # Old rows go before the new fingerprint is written, and dropped lines before it is
            # written that they were: a kill between the two loses no row and mixes no jobs.
            if not self.same:
                remove_file(unfinished_path(path))
            if self.empty:
                _empty(path)
                write_meta(path, self.wanted)
            else:
                if changed or (self.retry_errors and answered.failed):
                    drop_lines(path, sound, drop)
                    answered, sound = read_answered(path)
                note_meta(path, self.wanted)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.ftruncate(fd, sound)
            os.fsync(fd)
        return Journal(self.claim, fd, sound, answered, self.unfinished)


def check_place(path: Path, source: Path | None) -> None:
    """Raise JournalError if results cannot be written to `path`, as far as a look can tell."""
    with _usable(path):
        real = real_path(path)
        if not real.parent.is_dir():
            raise OSError(errno.ENOENT, f"there is no directory {real.parent}")
        if excess := excess_of_name(real):
            raise OSError(errno.ENAMETOOLONG, f"shorten its name by {excess} bytes")
        check_replaceable(path)
        if source is not None and same_file(path, source):
            raise JournalError(f"{path} is both the input and the output; give another output.")
        for beside in side_files(real):
            if beside.is_symlink() or (beside.exists() and not beside.is_file()):
                raise OSError(errno.EINVAL, f"{beside} is in the way, and is no regular file")


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(
            f"cannot use {path} for the results: {error.strerror or error}."
        ) from error


def _empty(path: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o666)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_lines(path: Path, sound: int, drop: Callable[[ResultLine], bool]) -> None:
    """Remove lines of a results file, and what comes after its `sound` bytes. Raises OSError."""
    replace_file(path, _kept(path, sound, drop))


def _kept(path: Path, sound: int, drop: Callable[[ResultLine], bool]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            sound -= len(line)
            if sound >= 0 and not drop(read_line(line)):
                yield line
