"""A whole results file written anew: in the order of the input, or without some of its lines."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hpc_distkv.batch.input.order import InputOrder
from hpc_distkv.batch.results.answered import Line, read_line
from hpc_distkv.batch.results.replace import replace_file


def order_lines(path: Path, order: InputOrder) -> None:
    """Put the lines of a results file, all of them sound, into the order of the input as it is now,
    and those of rows that are not in it any more behind them, by an ordered copy that is renamed.
    Takes some 60 bytes of memory per row. Raises OSError."""
    starts = array("q", [0])

    def lines() -> Iterator[Line]:
        with path.open("rb") as file:
            for line in file:
                starts.append(starts[-1] + len(line))
                yield read_line(line)

    sequence = np.argsort(order.places(lines()), kind="stable")
    if (sequence[1:] > sequence[:-1]).all():
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        replace_file(path, (whole[starts[row] : starts[row + 1]] for row in sequence))


def drop_lines(path: Path, sound: int, drop: Callable[[Line], bool]) -> None:
    """Remove lines of a results file, and what comes after its `sound` bytes. Raises OSError."""
    replace_file(path, _kept(path, sound, drop))


def _kept(path: Path, sound: int, drop: Callable[[Line], bool]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            sound -= len(line)
            if sound >= 0 and not drop(read_line(line)):
                yield line
