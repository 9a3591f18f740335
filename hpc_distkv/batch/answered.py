"""What earlier runs of a job have written already: read back from its results file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.response import ID_PREFIX

DUPLICATE = "duplicate_custom_id"
"""Error code of a row whose custom_id an earlier row has."""


class _Error(msgspec.Struct):
    code: str


class _Line(msgspec.Struct):
    id: str
    custom_id: str | None
    error: _Error | None


@dataclass
class Answered:
    """Which rows have a line in the results file, and how many of those lines are errors.

    A row is known by its custom_id. Rows without a usable one, and rows that repeat the
    custom_id of another, are known by their number.
    """

    custom_ids: set[str] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)
    failed: int = 0

    def add(self, line: bytes) -> None:
        """Count one line of the results file. Raises ValueError when it is not one."""
        try:
            row = msgspec.json.decode(line, type=_Line)
            number = int(row.id.removeprefix(ID_PREFIX))
        except RecursionError:
            raise ValueError("nested too deeply") from None
        duplicate = row.error is not None and row.error.code == DUPLICATE
        if row.custom_id is None or duplicate:
            self.numbers.add(number)
        else:
            self.custom_ids.add(row.custom_id)
        self.failed += row.error is not None


def read_answered(path: Path) -> tuple[Answered, int]:
    """The rows in a results file, and the length in bytes of its sound part.

    A process that is killed leaves at most one torn line, at the end: it is outside of the sound
    part. Raises JournalError for any other line that is not ours, OSError when reading fails.
    """
    answered = Answered()
    sound = 0
    torn: int | None = None
    with path.open("rb") as file:
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
