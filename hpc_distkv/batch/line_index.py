"""The lines of several results files, and where they are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_distkv.batch.answers.line import ResultLine, read_line
from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.results.answered import read_answered
from hpc_distkv.regular import open_regular

FILE_BITS = 16
"""Of a line's place, whose other bits are an offset."""


class LineIndex:
    """Owner of the open files, and of the places of their lines. Takes 9 bytes of memory a line,
    and holds none."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises OSError."""
        self.paths = paths
        self.failed = bytearray()
        """By line: whether it is an error row."""
        self._files = [open_regular(path) for path in paths]
        self._places = array("q")

    def __len__(self) -> int:
        return len(self._places)

    def lines(self) -> Iterator[tuple[int, ResultLine]]:
        """All lines, each with the number of its file; call once. Raises JournalError for a line
        that is none of a results file, or a row that has two in one file; a torn last line is
        passed over. Raises OSError when reading fails."""
        for file, path in enumerate(self.paths):
            start, sound = 0, read_answered(path)[1]
            while start < sound:
                line = self._files[file].readline()
                row = self._row(file, line)
                self._places.append(start << FILE_BITS | file)
                self.failed.append(row.failed)
                yield file, row
                start += len(line)

    def read(self, index: int) -> tuple[ResultLine, bytes]:
        """A line. Raises JournalError if it is not there any more, OSError when reading fails."""
        start, file = divmod(self._places[index], 1 << FILE_BITS)
        self._files[file].seek(start)
        line = self._files[file].readline()
        return self._row(file, line), line

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _row(self, file: int, line: bytes) -> ResultLine:
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no newline")
            return read_line(line)
        except ValueError:
            raise JournalError(
                f"{self.paths[file]} was changed meanwhile: wait until no run writes to it."
            ) from None
