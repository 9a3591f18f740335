"""How far a job is, from its files alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hpc_distkv.batch.errors import DUPLICATE, InputError, JournalError
from hpc_distkv.batch.input.envelope import Envelope
from hpc_distkv.batch.input.intake import MOST_NAMED, Intake
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.answered import Answered, read_answered
from hpc_distkv.batch.results.claim import STALE, Owner, read_claim
from hpc_distkv.batch.results.meta import ERRORS, INPUT, SHARD, read_meta
from hpc_distkv.batch.results.side_files import claim_path, unfinished_path
from hpc_distkv.batch.results.unfinished import read_unfinished
from hpc_distkv.regular import real_path

SILENT = 3 * STALE
"""Seconds without a sign of life after which a run that cannot be seen from here is said to be
silent; so much may clocks differ."""


@dataclass
class Status:
    """What a results file holds, and what is left."""

    output: Path
    answered: Answered
    begun: int
    """Rows without a line that a stopped run has begun."""
    begun_tokens: int
    """Output tokens that it has made of them."""
    owner: Owner | None
    """The run that writes to the file."""
    source: Path | None
    """The input."""
    shard: Shard | None
    """The part of it that is answered here."""
    silent: float = 0.0
    """Seconds since the run's last sign of life, if they are more than `SILENT`."""
    left: int | None = None
    """Rows of the input without a line; None: the input cannot be read."""
    gone: int = 0
    """Rows with a line that are not in the input any more."""
    gone_names: Sequence[str] = ()
    """custom_ids of some of them."""
    torn: int | None = None
    """Number of the last line of the input, if it ends within that: it is no row."""
    changed: int = 0
    """Rows with a line that were edited since, as far as is known."""

    @property
    def done(self) -> int:
        """Rows that have an answer."""
        return self.answered.lines - self.answered.failed

    @property
    def seconds(self) -> float | None:
        """For how long the run that goes on has been there, loading included."""
        since = self.owner.since if self.owner and not self.silent else 0.0
        return max(1.0, time.time() - since) if since else None

    @property
    def rate(self) -> float | None:
        """Rows that it answers in a second, in the mean; None: no run is seen."""
        return self.answered.recent / self.seconds if self.seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last row, if rows go on to end like that; None: nothing says."""
        return self.left / self.rate if self.left is not None and self.rate else None


def read_status(output: Path, source: Path | None = None, errors: Path | None = None) -> Status:
    """As `read_statuses`, of one file."""
    return read_statuses([output], source, errors)[0]


def read_statuses(
    outputs: Sequence[Path], source: Path | None = None, errors: Path | None = None
) -> list[Status]:
    """Read the files of several jobs or shards, and change nothing; runs may be writing to them.
    `source` and `errors`: the input, and the file of error rows, if they are not where they were.
    The input of shards is read once for all of them. Raises JournalError."""
    statuses = [_read(output, source, errors) for output in outputs]
    groups: dict[tuple[object, ...], list[Status]] = {}
    for number, status in enumerate(statuses):
        alone = status.shard is None or any(status.shard == s.shard for s in statuses[:number])
        key = (number,) if alone else (status.source, status.shard and status.shard.count)
        groups.setdefault(key, []).append(status)
    for group in groups.values():
        _compare(group)
    return statuses


def _read(output: Path, source: Path | None, errors: Path | None) -> Status:
    """What there is without a look at the input."""
    path = real_path(output)
    owner = read_claim(path)
    since = math.floor(owner.since) if owner and owner.since else math.inf
    try:
        meta = read_meta(path)
        answered, _ = read_answered(path, since)
        errors = errors or (Path(meta[ERRORS]) if ERRORS in meta else None)
        if errors and errors.exists():
            answered.include(read_answered(errors)[0])
        begun = read_unfinished(unfinished_path(path))
    except OSError as error:
        raise JournalError(f"cannot read {error.filename}: {error.strerror}.") from error
    open_rows = {answer: b for answer, b in begun.items()
                 if answer.custom_id not in answered.custom_ids}  # fmt: skip
    return Status(
        output=output,
        answered=answered,
        begun=len({answer.custom_id for answer in open_rows}),
        begun_tokens=sum(each.tokens for each in open_rows.values()),
        owner=owner,
        source=source or (Path(meta[INPUT]) if INPUT in meta else None),
        shard=Shard.parse(meta[SHARD]) if SHARD in meta else None,
        silent=_silent(path) if owner else 0.0,
    )


def _silent(path: Path) -> float:
    try:
        seconds = time.time() - claim_path(path).stat().st_mtime
    except OSError:  # it has just ended
        return 0.0
    return seconds if seconds > SILENT else 0.0


def _compare(group: Sequence[Status]) -> None:
    """Note what is left of their input; they are one status, or shards of one input. Takes the
    rows of the input out of what is answered."""
    source, shard = group[0].source, group[0].shard
    by_shard = {status.shard.index if status.shard else 1: status for status in group}
    left, changed = dict.fromkeys(by_shard, 0), dict.fromkeys(by_shard, 0)
    if source is None:
        return
    try:
        with closing(Intake(source)) as intake:
            for row in intake.envelopes():
                index = Shard.dealt(row.custom_id, row.number, shard.count) if shard else 1
                if index in by_shard:
                    answered = by_shard[index].answered
                    done = answered.take(row, _repeated(row))
                    left[index] += not done
                    changed[index] += done and _edited(row, answered)
    except InputError:
        return
    for index, status in by_shard.items():
        status.left, status.changed = left[index], changed[index]
        status.gone = status.answered.left_over
        status.gone_names = status.answered.names_left_over(MOST_NAMED)
        status.torn = intake.torn


def _edited(row: Envelope, answered: Answered) -> bool:
    """Whether a row that has a line was edited since it was answered."""
    return row.custom_id is not None and not _repeated(row) and answered.changed(row)


def _repeated(row: Envelope) -> bool:
    """Whether an earlier row has the custom_id."""
    return row.problem is not None and row.problem.code == DUPLICATE
