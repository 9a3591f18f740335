"""What earlier runs of a job have written already: read back from its results file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.response import ID_PREFIX
from hpc_distkv.regular import open_regular

DUPLICATE = "duplicate_custom_id"
"""Error code of a row whose custom_id an earlier row has."""


class _Error(msgspec.Struct, frozen=True):
    code: str


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Body(msgspec.Struct, frozen=True):
    usage: _Usage = _Usage()


class _Response(msgspec.Struct, frozen=True):
    body: _Body


class Line(msgspec.Struct, frozen=True):
    """What is read back of a line of the results."""

    id: str
    custom_id: str | None
    error: _Error | None
    response: _Response

    @property
    def number(self) -> int:
        """Place of the row in the input, from 0, when it was answered."""
        return int(self.id.removeprefix(ID_PREFIX))

    @property
    def failed(self) -> bool:
        """Whether it is an error row."""
        return self.error is not None


def read_line(line: bytes) -> Line:
    """One line of the results file. Raises ValueError when it is not one."""
    try:
        row = msgspec.json.decode(line, type=Line)
        _ = row.number
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return row


@dataclass
class Answered:
    """Which rows have a line in the results, how many of those lines are errors, and the tokens of
    the others.

    A row is known by its custom_id. Rows without a usable one, and rows that repeat the
    custom_id of another, are known by their number.
    """

    custom_ids: set[str] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)
    lines: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, line: bytes) -> None:
        """Count one line of the results. Raises ValueError when it is not one."""
        row = read_line(line)
        duplicate = row.error is not None and row.error.code == DUPLICATE
        if row.custom_id is None or duplicate:
            self.numbers.add(row.number)
        else:
            self.custom_ids.add(row.custom_id)
        self.lines += 1
        self.failed += row.failed
        usage = row.response.body.usage
        self.prompt_tokens += usage.prompt_tokens
        self.output_tokens += usage.completion_tokens

    def include(self, other: Answered) -> None:
        """Add what another file holds."""
        self.custom_ids |= other.custom_ids
        self.numbers |= other.numbers
        self.lines += other.lines
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens


def read_answered(path: Path) -> tuple[Answered, int]:
    """The rows in a results file, and the length in bytes of its sound part.

    A process that is killed leaves at most one torn line, at the end: it is outside of the sound
    part. Raises JournalError for any other line that is not ours, OSError when reading fails.
    """
    answered = Answered()
    sound = 0
    torn: int | None = None
    with open_regular(path) as file:
        for place, line in enumerate(file, start=1):
            if torn is not None:
                raise JournalError(
                    f"{path}: line {torn} is not a result line of this program. Repair or remove "
                    "the line and rerun, or use --overwrite or another output."
                )
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no newline")
                answered.add(line)
            except ValueError:
                torn = place
            else:
                sound += len(line)
    return answered, sound
