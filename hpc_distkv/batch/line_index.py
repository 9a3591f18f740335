"""Where in several files the line of each row is."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.batch.answered import Line, read_answered, read_line
from hpc_distkv.batch.errors import JournalError

DIGEST = 16
"""Bytes that stand for what a row is known by: that two rows have the same is out of question."""
FILE_BITS = 16
"""Of a place, whose other bits are an offset."""


class LineIndex:
    """Owner of the places of all lines of some results files. Takes 33 bytes of memory a row, and
    holds no line."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises JournalError for a line that is none of a results file, but for a torn last one,
        which is passed over; OSError when reading fails."""
        self.paths = paths
        self._files = [path.open("rb") for path in paths]
        digests, places, failed = bytearray(), array("q"), bytearray()
        for file, path in enumerate(paths):
            start, sound = 0, read_answered(path)[1]
            while start < sound:
                line = self._files[file].readline()
                row = read_line(line)
                digests += _digest(row.name, row.number)
                places.append(start << FILE_BITS | file)
                failed.append(row.failed)
                start += len(line)
        unsorted = np.frombuffer(bytes(digests), f"S{DIGEST}")
        order = np.argsort(unsorted, kind="stable")
        self._digests = unsorted[order]
        self._places: NDArray[np.int64] = np.frombuffer(places, np.int64)[order]
        self.failed: NDArray[np.uint8] = np.frombuffer(bytes(failed), np.uint8)[order]
        """By line: whether it is an error row."""

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, name: str | None, number: int) -> int | None:
        """The line of the row that is known by its custom_id `name`, or by its number; None: it
        has none."""
        wanted = _digest(name, number)
        at = int(self._digests.searchsorted(np.array(wanted, self._digests.dtype)))
        return at if at < len(self) and self._digest(at) == wanted else None

    def twice(self) -> list[int]:
        """Lines of rows that have another line before."""
        return (1 + np.flatnonzero(self._digests[1:] == self._digests[:-1])).tolist()

    def read(self, index: int) -> tuple[Line, bytes]:
        """A line. Raises JournalError if it is not there any more, OSError when reading fails."""
        start, number = divmod(int(self._places[index]), 1 << FILE_BITS)
        self._files[number].seek(start)
        line = self._files[number].readline()
        try:
            row = read_line(line)
            if not line.endswith(b"\n") or _digest(row.name, row.number) != self._digest(index):
                raise ValueError("another line")
        except ValueError:
            raise JournalError(
                f"{self.paths[number]} was changed meanwhile: wait until no run writes to it."
            ) from None
        return row, line

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _digest(self, index: int) -> bytes:
        # numpy takes zeros at the end of bytes for padding.
        return bytes(self._digests[index]).ljust(DIGEST, b"\0")


def _digest(name: str | None, number: int) -> bytes:
    known_by = f"number {number}" if name is None else f"custom_id {name}"
    return hashlib.blake2b(known_by.encode(errors="surrogatepass"), digest_size=DIGEST).digest()
