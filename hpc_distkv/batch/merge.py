"""The results of all shards put together into those of the whole job."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_distkv.batch.answers.line import ID_PREFIX, ResultLine
from hpc_distkv.batch.errors import InputError, JournalError
from hpc_distkv.batch.input.envelope import Envelope
from hpc_distkv.batch.input.intake import MOST_NAMED, Intake
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.line_index import FILE_BITS, LineIndex
from hpc_distkv.batch.results.claim import Claim
from hpc_distkv.batch.results.meta import (
    ERRORS,
    FREE,
    INPUT,
    SHARD,
    describe,
    differences,
    read_meta,
    write_meta,
)
from hpc_distkv.batch.results.opening import check_place
from hpc_distkv.batch.results.order import GONE, InputOrder
from hpc_distkv.batch.results.side_files import unfinished_path
from hpc_distkv.batch.results.unfinished import read_unfinished, write_unfinished
from hpc_distkv.regular import real_path, replace_file

_UNKNOWN = 0
"""In place of the hash of what was asked: no digest says it, or the row is known by that alone."""
_ID = re.compile(rb'("id"\s*:\s*"' + ID_PREFIX.encode() + rb")[\d.]+")
"""Nothing else in a line is like it: quotation marks within a text are escaped."""


@dataclass(frozen=True)
class ShardResults:
    """The results file of one shard."""

    path: Path
    meta: dict[str, Any]
    shard: Shard

    @classmethod
    def read(cls, path: Path) -> ShardResults:
        """Raises JournalError, OSError."""
        path = real_path(path)
        meta = read_meta(path)
        if SHARD not in meta:
            raise JournalError(f"{path} is no shard: its job answers all of the input.")
        return cls(path, meta, Shard.parse(meta[SHARD]))

    @property
    def files(self) -> list[Path]:
        """Where its lines are."""
        errors = [Path(self.meta[ERRORS])] if ERRORS in self.meta else []
        return [self.path, *(path for path in errors if path.exists())]


@dataclass
class Merged:
    """What came of it."""

    answered: int = 0
    failed: int = 0
    gone: int = 0
    """Rows of the shards that are not in the input any more; they are left out."""
    gone_names: Sequence[str] = ()
    """custom_ids of some of them."""
    changed: int = 0
    """Rows that were edited since they were answered, as far as is known."""
    left: dict[int, int] = field(default_factory=dict)
    """Index of a shard → rows of it without a line."""
    written: bool = False

    @property
    def missing(self) -> int:
        """Rows without a line."""
        return sum(self.left.values())


def merge(
    output: Path,
    shards: Sequence[Path],
    source: Path | None = None,
    errors: Path | None = None,
    partial: bool = False,
) -> Merged:
    """Write one line for each row of the input into `output`, in the order of the input, from the
    results files of all shards; error rows into `errors` if it is given. What is written can be
    resumed like the results of a job without shards. Nothing is written if rows have no line,
    unless `partial`. `source`: the input, if it is not where it was.

    Takes some 100 bytes of memory a row, and never holds the lines. Raises JournalError, and
    InputError if the input cannot be read.
    """
    try:
        parts = [ShardResults.read(path) for path in shards]
        _check(parts, partial)
        source = source or _source(parts)
        for path in filter(None, (output, errors)):
            _check_free(path, source)
        if errors and real_path(errors).absolute() == real_path(output).absolute():
            raise JournalError(f"{errors} is both the results and the error file.")
        with ExitStack() as stack:
            for path in filter(None, (output, errors)):
                stack.enter_context(Claim.take(path))
            index = stack.enter_context(closing(LineIndex([f for p in parts for f in p.files])))
            return _merge(index, parts, source, real_path(output), errors, partial)
    except OSError as error:
        what = error.filename or output
        raise JournalError(f"cannot merge: {what}: {error.strerror or error}.") from error


def _merge(
    index: LineIndex,
    parts: Sequence[ShardResults],
    source: Path,
    output: Path,
    errors: Path | None,
    partial: bool,
) -> Merged:
    merged, order = Merged(), _Order(index, parts, source)
    merged.left = order.left
    merged.gone = len(order.gone)
    some = (index.read(line)[0].custom_id for line in order.gone[:MOST_NAMED].tolist())
    merged.gone_names = [name for name in some if name is not None]
    merged.changed = order.changed
    merged.failed = sum(index.failed[line] for line in order.lines)
    merged.answered = len(order.lines) - merged.failed
    if merged.missing and not partial:
        return merged

    def pieces(failed: set[int]) -> Iterator[bytes]:
        for line, number in zip(order.lines.tolist(), order.numbers.tolist(), strict=True):
            if index.failed[line] in failed:
                yield _numbered(*index.read(line), number)

    job = {name: value for name, value in parts[0].meta.items() if name not in FREE | {SHARD}}
    if errors:
        errors = real_path(errors)
        write_meta(errors, describe(job, None, None, None))
        replace_file(errors, pieces({1}))
    write_meta(output, describe(job, source, errors, None))
    if merged.missing:
        _keep_begun(parts, output)
    replace_file(output, pieces({0} if errors else {0, 1}))
    merged.written = True
    return merged


class _Order:
    """The lines in the order of the input as it is now."""

    def __init__(self, index: LineIndex, parts: Sequence[ShardResults], source: Path) -> None:
        """Raises InputError and JournalError, OSError when reading fails."""
        numbers, dealt, asked, answered = array("q"), array("q"), array("q"), array("q")
        count = parts[0].shard.count

        def noted(rows: Iterator[Envelope]) -> Iterator[Envelope]:
            for row in rows:
                numbers.append(row.number)
                dealt.append(Shard.dealt(row.custom_id, row.number, count))
                asked.append(hash(row.digest))
                yield row

        def known(lines: Iterator[ResultLine]) -> Iterator[ResultLine]:
            for line in lines:
                digest = line.request_digest if line.named else None
                answered.append(hash(digest) if digest else _UNKNOWN)
                yield line

        with closing(Intake(source)) as intake:
            order = InputOrder(noted(intake.again()))
            if intake.torn is not None:
                raise InputError(f"{source} ends within a line: is it still being copied?")
        places = order.places(known(_own_lines(index, parts)))
        lines = np.argsort(places, kind="stable")
        self.lines = lines[places[lines] != GONE]
        """Numbers of the lines, in `index`."""
        self.gone = np.flatnonzero(places == GONE)
        """Those of rows that are not in the input any more."""
        self.numbers = places[self.lines]
        """Of their rows."""
        missing = ~np.isin(np.array(numbers, np.int64), self.numbers)
        self.left = dict(sorted(Counter(np.array(dealt, np.int64)[missing].tolist()).items()))
        """Index of a shard → rows of it without a line."""
        digests = np.array(answered, np.int64)[self.lines]
        rows = np.array(numbers, np.int64).searchsorted(self.numbers[digests != _UNKNOWN])
        edited = np.array(asked, np.int64)[rows] != digests[digests != _UNKNOWN]
        self.changed = int(np.count_nonzero(edited))
        """Rows that were edited since they were answered, as far as is known."""


def _own_lines(index: LineIndex, parts: Sequence[ShardResults]) -> Iterator[ResultLine]:
    """All lines, each of a row of its shard and none twice. Raises JournalError."""
    shards = [part.shard for part in parts for _ in part.files]
    names = array("q")
    for file, row in index.lines():
        if not shards[file].has(row.custom_id, row.number):
            raise JournalError(
                f"{index.paths[file]} is shard {shards[file]} and has a row of another one: "
                f"{row.custom_id or row.id}."
            )
        names.append(hash(row.custom_id if row.named else row.place))
        yield row
    order = np.argsort(np.array(names, np.int64), kind="stable")
    ordered = np.array(names, np.int64)[order]
    if len(twice := order[1:][ordered[1:] == ordered[:-1]]):
        row = index.read(int(twice[0]))[0]
        raise JournalError(
            f"{len(twice)} rows have a line among the results of their shard and one among its "
            f"error rows, such as {row.custom_id or row.id}: remove one of the two."
        )


def _numbered(row: ResultLine, line: bytes, number: int) -> bytes:
    """The line with the number that its row has in the input as it is now: so ids are unique."""
    if row.id == f"{ID_PREFIX}{number}":
        return line
    return _ID.sub(rb"\g<1>%d" % number, line, count=1)


def _keep_begun(parts: Sequence[ShardResults], output: Path) -> None:
    """What stopped runs have begun goes along, for the rows that are left."""
    begun = [b for part in parts for b in read_unfinished(unfinished_path(part.path)).values()]
    if begun:
        write_unfinished(unfinished_path(output), begun)


def _check(parts: Sequence[ShardResults], partial: bool) -> None:
    """Whether they are all shards of one job. Raises JournalError."""
    if not parts or 2 * len(parts) > 1 << FILE_BITS:
        raise JournalError(f"{len(parts)} shards cannot be merged.")
    first, seen = parts[0], dict[Shard, Path]()
    for part in parts:
        if part.shard.count != first.shard.count:
            raise JournalError(
                f"{first.path} is shard {first.shard}, {part.path} shard {part.shard}: these are "
                "not shards of one job."
            )
        if part.shard in seen:
            raise JournalError(f"{seen[part.shard]} and {part.path} are both shard {part.shard}.")
        seen[part.shard] = part.path
        if found := differences(part.meta, {**first.meta, SHARD: str(part.shard)}):
            raise JournalError(
                f"{part.path} holds results of another job than {first.path}: {'; '.join(found)}."
            )
    there = {part.shard.index for part in parts}
    absent = [str(i) for i in range(1, first.shard.count + 1) if i not in there]
    if absent and not partial:
        raise JournalError(
            f"shards {', '.join(absent)} of {first.shard.count} are not given: name the results "
            "files of all shards, or merge what there is with --partial."
        )


def _source(parts: Sequence[ShardResults]) -> Path:
    """The input of all shards. Raises JournalError."""
    sources = {part.meta.get(INPUT) for part in parts}
    found = sources.pop()
    if sources or found is None:
        raise JournalError("the shards do not name one input: give it with -i.")
    return Path(found)


def _check_free(path: Path, source: Path) -> None:
    """Whether nothing would be lost there. Raises JournalError, OSError."""
    check_place(path, source)
    if path.exists() and path.stat().st_size:
        raise JournalError(f"{path} is there already: give another place, or remove it.")
