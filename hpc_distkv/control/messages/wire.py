"""Reports on the wire: a row of numbers each, so that rank 0 reads ten thousand of them at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from hpc_distkv.control.messages.report import Changes, Report
from hpc_distkv.control.rows.work import STEP_TOKENS
from hpc_distkv.errors import FaultError

COLUMNS = {
    code: [field.name for field in msgspec.structs.fields(Report) if field.type is kind]
    for kind, code in ((int, "q"), (float, "f"), (bool, "?"))
}
"""Format, as of `struct` and of a numpy dtype, → the fields of `Report` that have it: in the order
of the wire, little-endian."""
SIGNED = frozenset({"youngest"})
"""Columns that may be -1."""

_ROW = struct.Struct("<" + "".join(len(names) * code for code, names in COLUMNS.items()))
_DTYPE = np.dtype([(code, "<" + code, len(names)) for code, names in COLUMNS.items()])
_LEAST = np.array([[-1 if name in SIGNED else 0] for name in COLUMNS["q"]])
_numbers = attrgetter(*chain(*COLUMNS.values()))
_changes = msgspec.msgpack.Decoder(Changes)
_NOTHING = Changes()


class ReportError(FaultError):
    """A report that no healthy instance sends: the gManager refuses to act on it."""


def encode_report(report: Report) -> bytes:
    """The report's row of numbers, and its changes if there are any."""
    row = _ROW.pack(*_numbers(report))
    return row if report.changes == _NOTHING else row + msgspec.msgpack.encode(report.changes)


class Reports:
    """The reports of one round, by column: `reports["free"][instance]`."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        """Raises ReportError, naming the instance, for a message that is no report."""
        for instance, message in enumerate(messages):
            if len(message) < _ROW.size:
                raise ReportError(f"instance {instance} sent {len(message)} bytes, no report")
        rows = b"".join([message[: _ROW.size] for message in messages])
        numbers = np.frombuffer(rows, _DTYPE)
        self._blocks = {code: np.ascontiguousarray(numbers[code].T) for code in COLUMNS}
        """Format → all its columns: [column, instance]."""
        self._columns: dict[str, np.ndarray[Any, Any]] = {}
        for code, block in self._blocks.items():
            block.flags.writeable = False
            self._columns |= zip(COLUMNS[code], block, strict=True)
        self.changes = {
            instance: _decoded(instance, message[_ROW.size :])
            for instance, message in enumerate(messages)
            if len(message) > _ROW.size
        }
        """Instance → what its report has beside the numbers."""

    def __getitem__(self, column: str) -> np.ndarray[Any, Any]:
        """One value per instance, read-only."""
        return self._columns[column]

    def __len__(self) -> int:
        return len(self["round"])

    def check(self, round: int) -> None:
        """Refuse what cannot be. Raises ReportError."""
        self._refuse(self["round"] != round, f"not of round {round}: it is stale", "round")
        counts, times = self._blocks["q"], self._blocks["f"]
        self._refuse(counts < _LEAST, "negative", *COLUMNS["q"])
        self._refuse(~((times >= 0) & (times < np.inf)), "no time", *COLUMNS["f"])
        self._refuse(self["free"] > self["capacity"], "more than its pool", "free")
        self._refuse(self["promised"] > self["free"], "more than is free", "promised")
        instances = len(self)
        for instance, changes in self.changes.items():
            for debtor, blocks in (changes.lent or {}).items():
                if not 0 <= debtor < instances or debtor == instance or blocks < 0:
                    raise ReportError(
                        f"instance {instance} reports a loan of {blocks} rBlocks to {debtor}"
                    )
            for row in changes.large:
                numbers = (row.held, row.blocks, row.prompt, row.output)
                if not all(0 <= number < float("inf") for number in numbers):
                    raise ReportError(
                        f"instance {instance} reports of request {row.request} what cannot be: "
                        f"{numbers}"
                    )

    def step_tokens(self) -> float:
        """Prompt tokens that could be computed in the time of a decode step, in the mean over what
        runs."""
        known = (self["prompt_time"] > 0) & (self["running"] > 0) & (self["fixed"] > 0)
        if not known.any():
            return STEP_TOKENS
        steps = self["fixed"] + self["per_token"] * self["running"]
        steps = steps + self["per_kv"] * self["kv_tokens"]
        return float(steps[known].mean() / self["prompt_time"][known].mean())

    def _refuse(self, bad: np.ndarray[Any, Any], why: str, *columns: str) -> None:
        """`bad`: [column, instance], or [instance] for one column."""
        if bad.any():
            column, instance = divmod(int(bad.argmax()), len(self))
            name, value = columns[column], self[columns[column]][instance]
            raise ReportError(f"the report of instance {instance} says {name} {value}: {why}")


def _decoded(instance: int, message: bytes) -> Changes:
    try:
        return _changes.decode(message)
    except msgspec.DecodeError as error:
        raise ReportError(f"the report of instance {instance} is malformed: {error}") from error
