"""Reports on the wire: a row of numbers each, so that rank 0 reads ten thousand of them at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from hpc_distkv.control.messages import Changes, Report
from hpc_distkv.errors import FaultError

COLUMNS = {
    "round": "q",
    "capacity": "i",
    "free": "i",
    "promised": "i",
    "hosted": "i",
    "wanted": "i",
    "wanted_for": "q",
    "largest": "i",
    "starved": "?",
    "room_rows": "i",
    "room_tokens": "i",
    "running": "i",
    "waiting": "i",
    "seats": "i",
    "youngest": "q",
    "youngest_blocks": "i",
    "longest": "i",
    "lacking": "i",
    "prompt_tokens": "q",
    "generated_tokens": "q",
    "kv_tokens": "q",
    "work_left": "f",
    "row_blocks": "f",
    "fixed": "f",
    "per_token": "f",
    "per_kv": "f",
    "prompt_time": "f",
    "exchange": "f",
    "drain": "?",
    "halt": "?",
}
"""Field of `Report` → its format, as of `struct` and of a numpy dtype; little-endian."""
SIGNED = frozenset({"youngest"})
"""Columns that may be negative."""

_ROW = struct.Struct("<" + "".join(COLUMNS.values()))
_DTYPE = np.dtype([(name, "<" + code) for name, code in COLUMNS.items()])
_NOTHING = Changes()


class ReportError(FaultError):
    """A report that no healthy instance sends: the gManager refuses to act on it."""


def encode_report(report: Report) -> bytes:
    """The report's row of numbers, and its changes if there are any."""
    row = _ROW.pack(*(getattr(report, name) for name in COLUMNS))
    return row if report.changes == _NOTHING else row + msgspec.msgpack.encode(report.changes)


class Reports:
    """The reports of one round, by column: `reports["free"][instance]`."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        """Raises ReportError, naming the instance, for a message that is no report."""
        self.size = sum(map(len, messages))
        """Bytes of all messages."""
        for instance, message in enumerate(messages):
            if len(message) < _ROW.size:
                raise ReportError(f"instance {instance} sent {len(message)} bytes, no report")
        rows = b"".join([message[: _ROW.size] for message in messages])
        self._columns = np.frombuffer(rows, _DTYPE)
        self.changes = {
            instance: _changes(instance, message[_ROW.size :])
            for instance, message in enumerate(messages)
            if len(message) > _ROW.size
        }
        """Instance → what its report has beside the numbers."""

    def __getitem__(self, column: str) -> np.ndarray[Any, Any]:
        """One value per instance, read-only."""
        values: np.ndarray[Any, Any] = self._columns[column]
        return values

    def __len__(self) -> int:
        return len(self._columns)

    def check(self, round: int) -> None:
        """Refuse what cannot be. Raises ReportError."""
        self._refuse(self["round"] != round, f"not of round {round}: it is stale", "round")
        for name, code in COLUMNS.items():
            if code == "f":
                self._refuse(~(self[name] >= 0) | ~np.isfinite(self[name]), "no time", name)
            elif code != "?" and name not in SIGNED:
                self._refuse(self[name] < 0, "negative", name)
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

    def _refuse(self, bad: np.ndarray[Any, Any], why: str, column: str) -> None:
        if bad.any():
            instance = int(bad.argmax())
            value = self[column][instance]
            raise ReportError(f"the report of instance {instance} says {column} {value}: {why}")


def _changes(instance: int, message: bytes) -> Changes:
    try:
        return msgspec.msgpack.decode(message, type=Changes)
    except msgspec.DecodeError as error:
        raise ReportError(f"the report of instance {instance} is malformed: {error}") from error
