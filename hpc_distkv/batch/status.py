"""How far a job is, from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpc_distkv.batch.answered import Answered, read_answered
from hpc_distkv.batch.claim import Owner, read_claim
from hpc_distkv.batch.errors import InputError, JournalError
from hpc_distkv.batch.intake import Intake
from hpc_distkv.batch.job import SHARD
from hpc_distkv.batch.meta import ERRORS, INPUT, read_meta
from hpc_distkv.batch.replace import real_path
from hpc_distkv.batch.shard import Shard
from hpc_distkv.batch.side_files import unfinished_path
from hpc_distkv.batch.unfinished import read_unfinished


@dataclass(frozen=True)
class Status:
    """What a results file holds, and what is left."""

    answered: Answered
    left: int | None
    """Rows of the input without a line; None: the input cannot be read."""
    begun: int
    """Rows among them that a stopped run has begun."""
    begun_tokens: int
    """Output tokens that it has made of them."""
    owner: Owner | None
    """The run that writes to the file."""
    source: Path | None
    """The input."""


def read_status(output: Path, source: Path | None = None, errors: Path | None = None) -> Status:
    """Read a job's files, and change nothing; a run may be writing to them. `source`: the input, if
    it is not where it was; `errors`: the file of error rows, likewise. Raises JournalError."""
    output = real_path(output)
    try:
        meta = read_meta(output)
        answered, _ = read_answered(output)
        errors = errors or (Path(meta[ERRORS]) if ERRORS in meta else None)
        if errors and errors.exists():
            answered.include(read_answered(errors)[0])
    except OSError as error:
        raise JournalError(f"cannot read {error.filename}: {error.strerror}.") from error
    source = source or (Path(meta[INPUT]) if INPUT in meta else None)
    shard = Shard.parse(meta[SHARD]) if SHARD in meta else None
    begun = read_unfinished(unfinished_path(output))
    open_rows = {answer: b for answer, b in begun.items()
                 if answer.custom_id not in answered.custom_ids}  # fmt: skip
    return Status(
        answered=answered,
        begun=len({answer.custom_id for answer in open_rows}),
        begun_tokens=sum(each.tokens for each in open_rows.values()),
        owner=read_claim(output),
        source=source,
        left=_count_left(source, shard, answered) if source else None,
    )


def _count_left(source: Path, shard: Shard | None, answered: Answered) -> int | None:
    try:
        intake = Intake(source, shard)
    except InputError:
        return None
    try:
        return sum(envelope is not None for envelope in intake.envelopes(answered))
    finally:
        intake.close()
