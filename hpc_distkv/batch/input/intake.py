"""The input file, line by line: what is blank, too long, answered before or given twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hpc_distkv.batch.errors import DUPLICATE, InputError, RowError
from hpc_distkv.batch.input.envelope import Envelope, read_envelope
from hpc_distkv.batch.input.not_jsonl import BOM, problem_of
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.regular import open_regular

MOST_NAMED = 3
"""Rows that a sentence names."""
LONGEST_LINE = 256 << 20
"""Bytes. A longer line is an error row, and is not read into memory."""


class AnsweredRows(Protocol):
    """The rows that have a line in the results: `batch.results.answered.Answered`."""

    def take(self, row: Envelope, repeated: bool) -> bool:
        """Whether a row has a line, which then is for no other row."""

    def changed(self, row: Envelope) -> bool:
        """Whether a row that has a line was edited since it was answered."""


class Intake:
    """Owner of the open input file; iterate once to get the rows that still need an answer.

    Holds every custom_id it has seen (about 100 bytes a row), never the rows.
    """

    def __init__(self, path: str | os.PathLike[str], shard: Shard | None = None) -> None:
        """Opens the file, for the rows of `shard` if it is given. Raises InputError."""
        self.path = Path(path)
        self._shard = shard
        if str(path) == "-":
            raise InputError("the input must be a file: a stream cannot be read again to resume.")
        try:
            self._file = open_regular(self.path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}.") from error
        state = os.fstat(self._file.fileno())
        if problem := self._other_file():
            self._file.close()
            raise InputError(f"cannot read {path}: it {problem}.")
        self.size = state.st_size
        """Bytes of the file when it was opened."""
        self.bytes_read = 0
        self.rows = 0
        """Rows seen so far, blank lines left out."""
        self.skipped = 0
        """Rows among them that were answered before."""
        self.exhausted = False
        """Whether the last row has been seen."""
        self.torn: int | None = None
        """Number of the last line, if the file was found to end within it: it is no row."""
        self.changed: list[str] = []
        """custom_ids of rows that were edited since they were answered."""
        self.outdated = False
        """Whether `look` has found another file, or one that grew, shrank or was written to."""
        self._version = _version(state)
        self._stopped = False

    def envelopes(self, answered: AnsweredRows | None = None) -> Iterator[Envelope]:
        """The rows not in `answered`, in order; a repeated custom_id comes with a problem.

        Takes the rows out of `answered`. Raises InputError when reading fails.
        """
        seen: set[str] = set()
        for envelope in self._envelopes():
            custom_id = envelope.custom_id
            self.rows += 1
            repeated = custom_id in seen
            done = answered is not None and answered.take(envelope, repeated)
            if done:
                self.skipped += 1
            if custom_id is not None and repeated:
                envelope = _duplicate(envelope, custom_id)
            elif custom_id is not None:
                seen.add(custom_id)
                if answered is not None and done and answered.changed(envelope):
                    self.changed.append(custom_id)
            if not done:
                yield envelope
        self.exhausted = not self._stopped

    def stop(self) -> None:
        """Have `envelopes` end before the next line, in whatever thread it is."""
        self._stopped = True

    def again(self) -> Iterator[Envelope]:
        """All rows once more, whether or not they were answered; once they have been read. Raises
        InputError."""
        self._stopped = False
        self._file.seek(0)
        self.bytes_read = 0
        return self._envelopes()

    def look(self) -> None:
        """See whether the file is still what was opened."""
        try:
            state = os.stat(self.path)
        except OSError:  # it is gone, and what was read is all there is
            return
        self.outdated = _version(state) != self._version

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _envelopes(self) -> Iterator[Envelope]:
        """The rows of the shard."""
        for number, line in self._lines():
            envelope = _too_long(number) if line is None else read_envelope(line, number)
            if self._shard is None or self._shard.has(envelope.custom_id, number):
                yield envelope

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        number = 0
        while line := self._readline():
            whole: bytes | None = line
            while line and len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                whole = None
                line = self._readline()
            if whole is not None and number == 0:
                whole = whole.removeprefix(BOM)
            if whole and _ends_within(whole):
                self.torn = number
                return
            if whole is None or (whole and not whole.isspace()):
                yield number, whole
            number += 1

    def _other_file(self) -> str | None:
        try:
            return problem_of(self._file.fileno())
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    def _readline(self) -> bytes:
        if self._stopped:
            return b""
        try:
            line = self._file.readline(LONGEST_LINE)
        except OSError as error:
            raise InputError(
                f"cannot read {self.path} beyond byte {self.bytes_read}: {error.strerror}. "
                "Rerun the same command to resume."
            ) from error
        self.bytes_read += len(line)
        return line


def _too_long(number: int) -> Envelope:
    return Envelope(
        number,
        problem=RowError(
            f"The line is longer than {LONGEST_LINE} bytes.", code="line_too_long", status=413
        ),
    )


def _version(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _ends_within(line: bytes) -> bool:
    """Whether a line is cut off: the last of a file that is still being copied."""
    if line.endswith(b"\n") or line.isspace():
        return False
    try:
        json.loads(line.decode(), parse_int=str)  # no number is too large to be whole
    except RecursionError:
        return not line.rstrip().endswith(b"}")
    except ValueError:
        return True
    return False


def _duplicate(envelope: Envelope, custom_id: str) -> Envelope:
    problem = RowError(
        f"An earlier row has the custom_id '{custom_id}' already.",
        code=DUPLICATE,
        param="custom_id",
    )
    return replace(envelope, problem=problem)


def named(custom_ids: Sequence[str], count: int) -> str:
    """The first ones of `count` rows, in brackets behind them; nothing if none has a name."""
    if not custom_ids:
        return ""
    shown = custom_ids[:MOST_NAMED]
    return f" ({', '.join(map(repr, shown))}{', …' if count > len(shown) else ''})"


def remarks(intake: Intake) -> Iterator[str]:
    """Why the results are not what a reader of the input may think, when a run is over."""
    if edited := intake.changed:
        yield (
            f"edited since they were answered, and left with their old lines: {len(edited)} rows "
            f"of {intake.path}{named(edited, len(edited))}; --retry-changed answers them again"
        )
    if intake.torn is not None:
        yield (
            f"{intake.path} ends within line {intake.torn + 1}: is it still being copied? That "
            "line is not answered; run the same command again when it is whole"
        )
    if intake.outdated:
        yield (
            f"{intake.path} was changed while it was read: run the same command again to answer "
            "what is new in it"
        )
