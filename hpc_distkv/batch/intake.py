"""The input file, line by line: what is blank, too long, answered before or given twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hpc_distkv.batch.answered import DUPLICATE, Answered
from hpc_distkv.batch.errors import InputError, RowError
from hpc_distkv.batch.schema import Envelope, read_envelope
from hpc_distkv.batch.shard import Shard
from hpc_distkv.regular import open_regular

LONGEST_LINE = 256 << 20
"""Bytes. A longer line is an error row, and is not read into memory."""
_BOM = b"\xef\xbb\xbf"
OTHER_FILES = {
    b"\x1f\x8b": "is compressed: unpack it (gunzip)",
    b"\xff\xfe": "is not in UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is not in UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
}
"""First bytes of what is no JSONL, and what to do with it."""


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
        if problem := OTHER_FILES.get(os.pread(self._file.fileno(), 2, 0)):
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

    def envelopes(self, answered: Answered) -> Iterator[Envelope | None]:
        """The rows not in `answered`, in order, and None for each that is passed over; a repeated
        custom_id comes with a problem.

        Takes over the custom_ids of `answered`. Raises InputError when reading fails.
        """
        seen: set[str] = set()
        for number, line in self._lines():
            envelope = _too_long(number) if line is None else read_envelope(line, number)
            custom_id = envelope.custom_id
            if self._shard and not self._shard.has(custom_id, number):
                yield None
                continue
            self.rows += 1
            if custom_id is None:
                done = number in answered.numbers
            elif custom_id in seen:
                done = number in answered.numbers
                envelope = _duplicate(number, custom_id)
            else:
                done = custom_id in answered.custom_ids
                answered.custom_ids.discard(custom_id)
                seen.add(custom_id)
            if done:
                self.skipped += 1
            yield None if done else envelope
        self.exhausted = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        number = 0
        while line := self._readline():
            whole: bytes | None = line
            while line and len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                whole = None
                line = self._readline()
            if whole is not None and number == 0:
                whole = whole.removeprefix(_BOM)
            if whole is None or (whole and not whole.isspace()):
                yield number, whole
            number += 1

    def _readline(self) -> bytes:
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


def _duplicate(number: int, custom_id: str) -> Envelope:
    return Envelope(
        number,
        custom_id,
        problem=RowError(
            f"An earlier row has the custom_id '{custom_id}' already.",
            code=DUPLICATE,
            param="custom_id",
        ),
    )
