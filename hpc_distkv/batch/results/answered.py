"""The rows that have a line in a results file, read back from it."""

from __future__ import annotations

import contextlib
import math
from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path

import msgspec
import numpy as np

from hpc_distkv.batch.answers.line import ID_PREFIX, ResultLine, read_line
from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.envelope import Envelope
from hpc_distkv.regular import open_regular

_OURS = b'{"id":"' + ID_PREFIX.encode()
"""First bytes of a line that this program has written."""
_HIGHEST = 2**32 - 1
"""Numbers from here on are not told apart."""


class DoubledError(Exception):
    """A line answers a row that has its line; the text says which row."""


class CompactSet:
    """A set of integers in arrays of type `code` ("q": 8 bytes each, "I": 4). A look-up after an
    `add` sorts them all, so add all first."""

    def __init__(self, code: str) -> None:
        self._values = array(code)
        self._sorted = True

    def add(self, value: int) -> None:
        """Raises OverflowError for one that the type cannot hold."""
        self._values.append(value)
        self._sorted = False

    def include(self, other: CompactSet) -> None:
        """Add what another one of the same type holds."""
        self._values.extend(other._values)
        self._sorted = False

    def __contains__(self, value: int) -> bool:
        if not self._sorted:
            np.frombuffer(self._values, self._values.typecode).sort()
            self._sorted = True
        place = bisect_left(self._values, value)
        return place < len(self._values) and self._values[place] == value


@dataclass
class Answered:
    """Which rows have a line in the results, how many of those lines are errors, and the tokens of
    the others.

    A row is known by its custom_id. Rows without a usable one, and rows that repeat the custom_id
    of another, are known by their `request_digest` too; by their number, where the version that
    wrote the line knew none. Takes 12 bytes a row beside its custom_id.
    """

    custom_ids: set[str] = field(default_factory=set)
    others: Counter[tuple[str | None, str | int]] = field(default_factory=Counter)
    """custom_id, if there is one, and digest or number → lines of rows without one of their own."""
    lines: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    since: float = math.inf
    """A moment, in seconds since the epoch."""
    recent: int = 0
    """Rows answered since that moment."""
    _requests: CompactSet = field(default_factory=lambda: CompactSet("q"))
    """Hashes of custom_ids and what was asked under them."""
    _numbers: CompactSet = field(default_factory=lambda: CompactSet("I"))
    """Of all lines."""
    _unnamed: set[tuple[int, int]] = field(default_factory=set)
    """Numbers and revisions of lines that have no custom_id of their own."""
    _revision: int = 0
    """The highest of any line."""

    def add(self, line: bytes) -> None:
        """Count one line of the results. Raises ValueError when it is not one, and DoubledError."""
        row = read_line(line)
        number, revision = row.place
        self._know(row)
        self._numbers.add(min(number, _HIGHEST))
        self._revision = max(self._revision, revision)
        self.lines += 1
        self.failed += row.failed
        self.recent += row.response.body.created >= self.since
        usage = row.response.body.usage
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.completion_tokens

    def _know(self, row: ResultLine) -> None:
        if row.custom_id is not None and row.named:
            if row.custom_id in self.custom_ids:
                raise DoubledError(f"'{row.custom_id}'")
            self.custom_ids.add(row.custom_id)
            self._requests.add(hash((row.custom_id, row.request_digest)))
            return
        if row.place in self._unnamed:
            raise DoubledError(f"that was line {row.number + 1} of the input")
        self._unnamed.add(row.place)
        self.others[row.custom_id, row.request_digest or row.number] += 1

    def include(self, other: Answered) -> None:
        """Add what another file holds."""
        self.custom_ids |= other.custom_ids
        self.others += other.others
        self.lines += other.lines
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self._requests.include(other._requests)
        self._numbers.include(other._numbers)
        self._revision = max(self._revision, other._revision)

    def take(self, row: Envelope, repeated: bool) -> bool:
        """Whether a row of the input has a line; that one is for no other row. `repeated`: an
        earlier row has the custom_id."""
        custom_id = row.custom_id
        if custom_id is None or repeated:
            return self._take((custom_id, row.digest)) or self._take((custom_id, row.number))
        found = custom_id in self.custom_ids
        self.custom_ids.discard(custom_id)
        return found

    def changed(self, row: Envelope) -> bool:
        """Whether a row was edited since the line with its custom_id was written, as far as is
        known."""
        name, asked = row.custom_id, self._requests
        return hash((name, None)) not in asked and hash((name, row.digest)) not in asked

    @property
    def left_over(self) -> int:
        """Lines that no row has taken: once the input has been read to its end, those of rows that
        are not in it any more."""
        return len(self.custom_ids) + self.others.total()

    def names_left_over(self, most: int) -> list[str]:
        """custom_ids of such lines, the first `most` of the alphabet."""
        repeated = {custom_id for custom_id, _ in self.others if custom_id is not None}
        return nsmallest(most, self.custom_ids | repeated)

    def revision(self, number: int) -> int:
        """Revision of a new line: 1, or higher if a line of another row has this number."""
        return self._revision + 1 if min(number, _HIGHEST) in self._numbers else 1

    def _take(self, key: tuple[str | None, str | int]) -> bool:
        if key not in self.others:
            return False
        self.others[key] -= 1
        if not self.others[key]:
            del self.others[key]
        return True


def read_answered(path: Path, since: float = math.inf) -> tuple[Answered, int]:
    """The rows in a results file, and the length in bytes of its sound part. Those answered since
    the moment `since` are counted apart.

    A process that is killed leaves at most one torn line, at the end: it is outside of the sound
    part. Raises JournalError for any other line that is not ours or whose row has one, OSError when
    reading fails.
    """
    answered = Answered(since=since)
    sound = 0
    with open_regular(path) as file:
        for place, line in enumerate(file, start=1):
            if _torn(line):
                break  # it is the last one
            try:
                answered.add(line)
            except ValueError:
                if not line.strip() and not file.peek(1):
                    break
                raise JournalError(
                    f"{path}: line {place} is not a result line of this program. Repair or remove "
                    "the line and rerun, or use --overwrite or another output."
                ) from None
            except DoubledError as row:
                raise JournalError(
                    f"{path}: the row {row} has two lines, {_twin(path, line, place)} and {place}. "
                    f"Remove one of each two and rerun (sort -u, if the whole file is doubled), or "
                    "use --overwrite or another output."
                ) from None
            sound += len(line)
    return answered, sound


def _torn(line: bytes) -> bool:
    """Whether a line is cut off, as the last one of a killed run may be: a prefix of a line of this
    program, or all of it but the newline, perhaps with zeros for bytes that had not reached the
    disk."""
    if line.endswith(b"\n"):
        return False
    line = line.rstrip(b"\0")
    with contextlib.suppress(ValueError):
        read_line(line)
        return True
    if not _OURS.startswith(line[: len(_OURS)]):
        return False
    try:
        msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return True
    return False  # it is whole, and no line of this program


def _twin(path: Path, line: bytes, place: int) -> int:
    """Which line before answers the row of the one at `place`."""
    known = read_line(line)
    with path.open("rb") as file:
        for number, other in zip(range(1, place), file, strict=False):
            row = read_line(other)
            if row.named != known.named:
                continue
            if (row.custom_id == known.custom_id) if row.named else (row.place == known.place):
                return number
    raise AssertionError("the row had a line")
