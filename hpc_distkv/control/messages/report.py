"""One instance to the gManager."""

from __future__ import annotations

import msgspec

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import NOBODY, Request, Result, Unfinished


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
    """Work of its prompt that is left (`control.rows.work`)."""
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
    (`control.messages.wire`)."""

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
    """Predicted work of all rows that run or wait here (`control.rows.work`)."""
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
