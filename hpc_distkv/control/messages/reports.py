"""A control round's messages: what instances report, and what the gManager answers.

A report is a row of numbers, so that rank 0 reads ten thousand of them at once, and changes, which
most reports do without."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import NOBODY, STEP_TOKENS, Request, Result, Unfinished
from hpc_distkv.errors import FaultError
from hpc_distkv.ids import InstanceId, RequestId


class Remains(msgspec.Struct, frozen=True, array_like=True):
    """What an instance has when a run is over: its counters, and what was not reported."""

    counters: Counters
    results: list[Result]
    unfinished: list[Unfinished]


class Large(msgspec.Struct, frozen=True, array_like=True):
    """What is expected of a request that is too large for one pool."""

    request: RequestId
    begun: bool
    """Whether it runs, or may begin as soon as there is room for its first tokens."""
    held: int
    """rBlocks that it has."""
    blocks: int
    """Its expected KV: the rBlocks it has at its end."""
    prompt: float
    """Work of its prompt that is left (`control.messages.requests.work`)."""
    output: float
    """Output tokens that are expected to be left."""


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """The part of a report that most reports do without."""

    lent: dict[InstanceId, int] | None = None
    """Debtor → rBlocks lent or set aside; None: as reported last."""
    results: list[Result] = []
    adopted: list[RequestId] = []
    """Requests of other instances that were handed over to this one."""
    counters: Counters | None = None
    returned: list[Request] = []
    """Requests that were not begun and go to another instance."""
    large: list[Large] = []
    """Requests too large for this instance: all that run, and the oldest that wait."""


Count = TypeVar("Count")
Number = TypeVar("Number")
Flag = TypeVar("Flag")
_NONE: Any = 0
_NOBODY: Any = NOBODY
NO_REQUEST: Any = -1
"""Where a number names a request, none: below every request."""


class Numbers(msgspec.Struct, Generic[Count, Number, Flag], frozen=True, kw_only=True):
    """The numbers of a report: a `Report` has one of each, `Reports` have an array of each. The
    format on the wire follows from this definition too."""

    round: Count
    capacity: Count
    """rBlocks in the pool."""
    free: Count
    promised: Count
    """rBlocks set aside until the answer: the most that may be granted."""
    hosted: Count = _NONE
    """rBlocks that hold KV of others."""
    wanted: Count = _NONE
    """rBlocks to borrow."""
    wanted_for: Count = _NOBODY
    """The oldest request that wants them; NOBODY when nothing is wanted."""
    largest: Count = _NONE
    """Expected KV, in rBlocks, of the largest request that wants any."""
    starved: Flag = _NONE
    """`wanted_for` cannot go on, and no younger request at home could be preempted."""
    room_requests: Count = _NONE
    """Requests that may be assigned now."""
    room_tokens: Count = _NONE
    """Prompt tokens after which no further request should be assigned."""
    running: Count = _NONE
    """Requests that have rBlocks."""
    waiting: Count = _NONE
    """Requests that were not begun and could begin there."""
    seats: Count = _NONE
    """Further requests that may run, if there is memory."""
    youngest: Count = NO_REQUEST
    """The youngest running request; NO_REQUEST: none runs."""
    youngest_blocks: Count = _NONE
    longest: Count = _NONE
    """Sealed rBlocks at home of the request that has most of them."""
    lacking: Count = _NONE
    """rBlocks that the oldest waiting request lacks to begin beside those that run; 0 if none
    does."""
    prompt_tokens: Count = _NONE
    """Prompt tokens computed so far, recomputed ones included."""
    generated_tokens: Count = _NONE
    """Output tokens so far."""
    kv_tokens: Count = _NONE
    """KV tokens attended to here in a step of decodes: own ones at home, and guests."""
    work_left: Number = _NONE
    """Predicted work of all requests that run or wait here (`control.messages.requests.work`)."""
    request_blocks: Number = _NONE
    """Mean expected KV, in rBlocks, of a request here; 0 if unknown."""
    fixed: Number = _NONE
    """Fitted seconds of a decode step, however many requests it has."""
    per_token: Number = _NONE
    """Fitted seconds of a decode step per request."""
    per_kv: Number = _NONE
    """Fitted seconds of a decode step per KV token."""
    prompt_time: Number = _NONE
    """Measured seconds to compute a prompt token; 0 if there were none yet."""
    exchange: Number = _NONE
    """Measured seconds that remote rBlocks add to a decode step; 0 if there were none yet."""
    drain: Flag = _NONE
    """The run should end soon."""
    halt: Flag = _NONE
    """The run should end now."""


class Report(Numbers[int, float, bool], frozen=True, kw_only=True):
    """One instance to the gManager at a round boundary."""

    changes: Changes = Changes()


COLUMNS = {
    code: [field.name for field in msgspec.structs.fields(Report) if field.type is kind]
    for kind, code in ((int, "q"), (float, "f"), (bool, "?"))
}
"""Format, as of `struct` and of a numpy dtype, → the numbers that have it: in the order of the
wire, little-endian."""
SIGNED = frozenset({"youngest"})
"""Numbers that may be NO_REQUEST."""

_ROW = struct.Struct("<" + "".join(len(names) * code for code, names in COLUMNS.items()))
_DTYPE = np.dtype([(code, "<" + code, len(names)) for code, names in COLUMNS.items()])
_LEAST = np.array([[NO_REQUEST if name in SIGNED else 0] for name in COLUMNS["q"]])
_numbers = attrgetter(*chain(*COLUMNS.values()))
_changes = msgspec.msgpack.Decoder(Changes)
_NOTHING = Changes()


class ReportError(FaultError):
    """A report that no healthy instance sends: the gManager refuses to act on it."""


def encode_report(report: Report) -> bytes:
    """The report's row of numbers, and its changes if there are any."""
    row = _ROW.pack(*_numbers(report))
    return row if report.changes == _NOTHING else row + msgspec.msgpack.encode(report.changes)


class Reports(
    Numbers[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]],
    frozen=True,
    kw_only=True,
    eq=False,
):
    """The reports of one round: each number as a read-only array with one value per instance."""

    counts: NDArray[np.int64]
    """All whole numbers: `[number, instance]`."""
    times: NDArray[np.float32]
    """All other numbers but flags: `[number, instance]`."""
    changes: dict[int, Changes]
    """Instance → what its report has beside the numbers."""

    @classmethod
    def decode(cls, messages: Sequence[bytes]) -> Reports:
        """Read the messages of `encode_report` of all instances, by instance. Raises ReportError,
        naming the instance, for a message that is no report."""
        for instance, message in enumerate(messages):
            if len(message) < _ROW.size:
                raise ReportError(f"instance {instance} sent {len(message)} bytes, no report")
        rows = np.frombuffer(b"".join([message[: _ROW.size] for message in messages]), _DTYPE)
        blocks = {code: np.ascontiguousarray(rows[code].T) for code in COLUMNS}
        columns: dict[str, Any] = {}
        for code, block in blocks.items():
            block.flags.writeable = False
            columns |= zip(COLUMNS[code], block, strict=True)
        changes = {
            instance: _decoded(instance, message[_ROW.size :])
            for instance, message in enumerate(messages)
            if len(message) > _ROW.size
        }
        return cls(**columns, counts=blocks["q"], times=blocks["f"], changes=changes)

    def __len__(self) -> int:
        return len(self.round)

    def check(self, round: int) -> None:
        """Refuse what cannot be. Raises ReportError."""
        self._refuse(self.round != round, f"not of round {round}: it is stale", "round")
        self._refuse(self.counts < _LEAST, "negative", *COLUMNS["q"])
        self._refuse(~((self.times >= 0) & (self.times < np.inf)), "no time", *COLUMNS["f"])
        self._refuse(self.free > self.capacity, "more than its pool", "free")
        self._refuse(self.promised > self.free, "more than is free", "promised")
        instances = len(self)
        for instance, changes in self.changes.items():
            for debtor, blocks in (changes.lent or {}).items():
                if not 0 <= debtor < instances or debtor == instance or blocks < 0:
                    raise ReportError(
                        f"instance {instance} reports a loan of {blocks} rBlocks to {debtor}"
                    )
            for large in changes.large:
                numbers = (large.held, large.blocks, large.prompt, large.output)
                if not all(0 <= number < float("inf") for number in numbers):
                    raise ReportError(
                        f"instance {instance} reports of request {large.request} what cannot be: "
                        f"{numbers}"
                    )

    def step_tokens(self) -> float:
        """Prompt tokens that could be computed in the time of a decode step: the mean over the
        instances that run."""
        known = (self.prompt_time > 0) & (self.running > 0) & (self.fixed > 0)
        if not known.any():
            return STEP_TOKENS
        steps = self.fixed + self.per_token * self.running + self.per_kv * self.kv_tokens
        return float(steps[known].mean() / self.prompt_time[known].mean())

    def _refuse(self, bad: NDArray[np.bool_], why: str, *columns: str) -> None:
        """`bad`: [column, instance], or [instance] for one column."""
        if bad.any():
            column, instance = divmod(int(bad.argmax()), len(self))
            name, value = columns[column], getattr(self, columns[column])[instance]
            raise ReportError(f"the report of instance {instance} says {name} {value}: {why}")


def _decoded(instance: int, message: bytes) -> Changes:
    try:
        return _changes.decode(message)
    except msgspec.DecodeError as error:
        raise ReportError(f"the report of instance {instance} is malformed: {error}") from error


class Answer(msgspec.Struct, omit_defaults=True):
    """The gManager to one instance, in force from its next boundary. Mutable while it is made."""

    round: int
    assign: list[Request] = []
    give_back: int = 0
    """Requests to return that were not begun, the youngest first."""
    lend: dict[InstanceId, int] = {}
    """Debtor → rBlocks of the promise to set aside for it."""
    granted: int = 0
    """rBlocks of those wanted that were granted: credit that their creditors will open by mail."""
    shed: dict[InstanceId, int] = {}
    """Creditor → rBlocks of the longest requests to move there as credit is opened."""
    recall: dict[InstanceId, int] = {}
    """Creditor → rBlocks to bring home."""
    keep: int = 0
    """rBlocks to leave free for loans to come: admit nothing into them."""
    begin: list[RequestId] = []
    """Requests too large for the instance that may begin with what there is, and borrow."""
    admit_before: int = NOBODY
    """No request younger than this may be admitted; NOBODY: all may."""
    preempt: int = 0
    """rBlocks to free by preempting requests younger than `admit_before`."""
    preempt_at: InstanceId | None = None
    """Where; None: anywhere."""
    drain: bool = False
    """Begin nothing any more: the run ends before all requests are answered."""
    stop: bool = False
    """The run is over, whatever still runs."""
