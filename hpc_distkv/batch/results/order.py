"""The order of the input, and results that are put into it."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.batch.answers.line import ResultLine, read_line
from hpc_distkv.batch.input.envelope import Envelope
from hpc_distkv.regular import replace_file

GONE = np.iinfo(np.int64).max
"""Place of a line whose row is not in the input any more."""
Numbers = NDArray[np.int64]
Flags = NDArray[np.int8]


class InputOrder:
    """The numbers of the rows of an input, by hashes of their names. Takes 16 bytes a row."""

    def __init__(self, rows: Iterable[Envelope]) -> None:
        keys, numbers = array("q"), array("q")
        for row in rows:
            digest = row.digest if row.custom_id is None else None
            keys.append(_key(row.custom_id, digest, row.number))
            numbers.append(row.number)
        order = np.argsort(_view(keys), kind="stable")
        self._keys, self._numbers = _view(keys)[order], _view(numbers)[order]

    def places(self, lines: Iterable[ResultLine]) -> Numbers:
        """Numbers of the rows that are answered by the lines of a results file [lines]. Of those
        that share a custom_id, or have none and are equal, the one that was answered comes first,
        and the others as they stood when they were."""
        keys, repeats, numbers, places = array("q"), array("b"), array("q"), array("q")
        for line in lines:
            keys.append(_key(line.custom_id, line.request_digest, line.number))
            repeats.append(line.repeated)
            numbers.append(line.number)
            known = line.custom_id is not None or line.request_digest is not None
            places.append(GONE if known else line.number)
        flags = np.frombuffer(repeats, np.int8)
        order = np.lexsort((_view(numbers), flags, _view(keys)))
        sought, repeated = _view(keys)[order], flags[order]
        index = self._keys.searchsorted(sought) + repeated + _ranks(sought, repeated)
        found = index < self._keys.searchsorted(sought, "right")
        _view(places)[order[found]] = self._numbers[index[found]]
        return _view(places)


def order_lines(path: Path, order: InputOrder) -> None:
    """Put the lines of a results file, all of them sound, into the order of the input as it is now,
    and those of rows that are not in it any more behind them, by an ordered copy that is renamed.
    Takes some 60 bytes of memory per row. Raises OSError."""
    starts = array("q", [0])

    def lines() -> Iterator[ResultLine]:
        with path.open("rb") as file:
            for line in file:
                starts.append(starts[-1] + len(line))
                yield read_line(line)

    sequence = np.argsort(order.places(lines()), kind="stable")
    if (sequence[1:] > sequence[:-1]).all():
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        replace_file(path, (whole[starts[row] : starts[row + 1]] for row in sequence))


def _key(custom_id: str | None, digest: str | None, number: int) -> int:
    """Hash of what `Answered` knows a row by: its custom_id, or its digest or number."""
    return hash(custom_id) if custom_id is not None else hash((digest or number,))


def _ranks(keys: Numbers, flags: Flags) -> Numbers:
    """For each of the sorted rows, how many equal ones are before it [rows]."""
    index = np.arange(len(keys))
    new = np.zeros(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (flags[1:] != flags[:-1])
    return index - np.maximum.accumulate(np.where(new, index, 0))


def _view(values: array[int]) -> Numbers:
    return np.frombuffer(values, np.int64)
