"""Reports of the instances to the gManager, and how they travel: a row of numbers each, so that
rank 0 reads ten thousand of them at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from hpc_distkv.control.assign.work import STEP_TOKENS
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import NOBODY, Request, Result, Unfinished
from hpc_distkv.errors import FaultError


class Remains(msgspec.Struct, frozen=True, array_like=True):
    """What an instance has when a run is over: its counters, and what was not reported."""

    counters: Counters
    results: list[Result]
    unfinished: list[Unfinished]


class Large(msgspec.Struct, frozen=True, array_like=True):
    """What may come of a row that is too large for one pool."""

    request: int
    begun: bool
    """Whether it runs, or may begin as soon as there is room for its first tokens."""
    held: int
    """rBlocks that it has."""
    blocks: int
    """rBlocks that it is expected to have at its end."""
    prompt: float
    """Work of its prompt that is left (`control.assign.work`)."""
    output: float
    """Output tokens that are expected to be left."""


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """The part of a report that most reports do without."""

    lent: dict[int, int] | None = None
    """Debtor → rBlocks lent or set aside; None: as reported last."""
    results: list[Result] = []
    adopted: list[int] = []
    """Requests of other instances that were handed over to this one."""
    counters: Counters | None = None
    returned: list[Request] = []
    """Rows that were not begun and go to another instance."""
    large: list[Large] = []
    """Rows too large for this instance: all that run, and the oldest that wait."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One instance to the gManager at a round boundary. All but `changes` is a row of numbers
    (`control.messages.reports`)."""

    round: int
    capacity: int
    """rBlocks in the pool."""
    free: int
    promised: int
    """rBlocks set aside until the answer: the most that may be granted."""
    hosted: int = 0
    """rBlocks that hold KV of others."""
    wanted: int = 0
    """rBlocks to borrow."""
    wanted_for: int = NOBODY
    """The oldest request that wants them; NOBODY when nothing is wanted."""
    largest: int = 0
    """rBlocks that the largest request that wants any may come to need in all."""
    starved: bool = False
    """`wanted_for` cannot go on, and no younger request at home could be preempted."""
    room_rows: int = 0
    """Rows that may be assigned now."""
    room_tokens: int = 0
    """Prompt tokens after which no further row should be assigned."""
    running: int = 0
    """Rows that have rBlocks."""
    waiting: int = 0
    """Rows that were not begun and could begin there."""
    seats: int = 0
    """Further rows that may run, if there is memory."""
    youngest: int = -1
    """The youngest running request; -1: none runs."""
    youngest_blocks: int = 0
    longest: int = 0
    """Sealed rBlocks at home of the request that has most of them."""
    lacking: int = 0
    """rBlocks that the oldest waiting row lacks to begin beside those that run; 0 if none does."""
    prompt_tokens: int = 0
    """Prompt tokens computed so far, recomputed ones included."""
    generated_tokens: int = 0
    """Output tokens so far."""
    kv_tokens: int = 0
    """KV tokens attended to here in a step of decodes: own ones at home, and guests."""
    work_left: float = 0.0
    """Predicted work of all rows that run or wait here (`control.assign.work`)."""
    row_blocks: float = 0.0
    """rBlocks that a row here comes to need in the mean; 0 if unknown."""
    fixed: float = 0.0
    """Fitted seconds of a decode step, whatever its rows."""
    per_token: float = 0.0
    """Fitted seconds of a decode step per row."""
    per_kv: float = 0.0
    """Fitted seconds of a decode step per KV token."""
    prompt_time: float = 0.0
    """Measured seconds to compute a prompt token; 0 if there were none yet."""
    exchange: float = 0.0
    """Measured seconds that remote rBlocks add to a decode step; 0 if there were none yet."""
    drain: bool = False
    """The run should end soon."""
    halt: bool = False
    """The run should end now."""
    changes: Changes = Changes()


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
