"""Which waiting sequence is admitted."""

from __future__ import annotations

import math
from typing import NamedTuple

from hpc_distkv.decide.foresight import ExpectedKv
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.state import CANDIDATES, NOTHING_WAITS, Outlook, State, too_large

REFUSED_STEPS = 8
"""Steps after which refused sequences are looked at again though nobody came or went: a sequence
admitted later has grown less when others end."""


class Headroom(NamedTuple):
    """rBlocks left beside the running sequences, and the expected KV that takes them."""

    for_large: int
    """Now, for a sequence that borrows."""
    now: int
    """Now, for any other."""
    in_all: int
    """The most that the `expected` KV of all sequences may take at any time."""
    expected: list[ExpectedKv]
    """Of the running sequences, and of those admitted."""


class Blocked(NamedTuple):
    """The oldest sequence that cannot be admitted."""

    kv: ExpectedKv
    """From when it is expected to begin."""
    lacking: int
    """rBlocks that it lacks to be admitted now."""


class Admission:
    """Admits the oldest waiting sequence whose expected KV (prompt plus predicted output) fits, now
    and while all running sequences grow. For the oldest that does not fit, room is reserved from
    when enough running sequences are expected to have ended; younger ones pass it if they leave it
    that room (EASY backfilling, Lifka 1995). A sequence too large for this instance is admitted
    when the gManager says so, and one whose prefix is being computed by another when that prefix is
    there.

    Owner of what it remembers: the state in which nobody could be admitted."""

    def __init__(self) -> None:
        self._refused: tuple[object, ...] = ()
        """The state in which nobody could be admitted."""
        self._refused_steps = 0
        """Steps in which that state was not looked at again."""

    def next(self, state: State) -> Sequence | None:
        """The waiting sequence to admit now."""
        waiting, running, orders = state.waiting, state.running, state.orders
        if orders.closed or not waiting or len(running) >= state.config.max_num_seqs:
            return None
        seen = _seen(state)
        if running and seen == self._refused and self._refused_steps < REFUSED_STEPS:
            self._refused_steps += 1
            return None
        room, blocked = _room(state), None
        for sequence in waiting[:CANDIDATES]:
            if sequence.id > orders.before:
                break
            if state.rm.prefixes.awaited(sequence.keys):
                continue
            if too_large(state, sequence):
                if _may_begin(state, sequence, room):
                    return sequence
            elif not (blocked := _oldest_blocked(state, sequence, room, blocked)):
                return sequence
        self._refused, self._refused_steps = seen, 0
        return None


def next_waiting(state: State) -> list[Sequence]:
    """The oldest waiting sequence, for which memory may be asked; none while another computes its
    prefix, or while no sequence may be admitted."""
    orders = state.orders
    if orders.closed or len(state.running) >= state.config.max_num_seqs:
        return []
    for sequence in state.waiting[:CANDIDATES]:
        if sequence.id > orders.before:
            return []
        if sequence.id in orders.begin or not too_large(state, sequence):
            return [] if state.rm.prefixes.awaited(sequence.keys) else [sequence]
    return []


def outlook(state: State) -> Outlook:
    """What becomes of the waiting sequences, those too large for this instance left out."""
    waiting, orders, foresight = state.waiting, state.orders, state.foresight
    if orders.closed or not waiting:
        return NOTHING_WAITS
    room = _room(state)
    seats = max(0, state.config.max_num_seqs - len(state.running))
    expected: list[ExpectedKv] = []
    oldest: Sequence | None = None
    blocked: Blocked | None = None
    for sequence in waiting[: min(CANDIDATES, seats)]:
        if sequence.id > orders.before:
            break
        if too_large(state, sequence) or state.rm.prefixes.awaited(sequence.keys):
            continue
        found = _oldest_blocked(state, sequence, room, blocked)
        if not found:
            expected.append(foresight.expected_kv(sequence))
            now = room.now - foresight.missing(sequence, sequence.length + 1)
            room = room._replace(now=now, expected=[*room.expected, expected[-1]])
        elif not blocked:
            oldest, blocked = sequence, found
            expected.append(found.kv)
    return Outlook(expected, oldest, blocked.lacking if blocked else 0)


def _seen(state: State) -> tuple[object, ...]:
    """All that decides on who is admitted, but for the expected growth."""
    rm, orders, running = state.rm, state.orders, state.running
    memory = (
        rm.borrower.credit,
        rm.lender.promised,
        rm.lender.lent,
        rm.borrower.borrowed,
        rm.prefixes.computing,
    )
    ids = (sequence.id for sequence in (*running, *state.waiting[:CANDIDATES]))
    return (orders.before, orders.keep, len(orders.begin), *memory, len(running), *ids)


def _room(state: State) -> Headroom:
    """The room for all waiting sequences."""
    rm, config, foresight, running = state.rm, state.config, state.foresight, state.running
    credit = rm.borrower.credit if config.policy.lending else 0
    free = rm.slots.usable + credit
    usual = free - state.orders.keep
    if any(too_large(state, sequence) for sequence in state.waiting):
        usual -= credit
    reserve = config.reserve if running else 0
    prompts = sum(foresight.missing(s, s.length + 1) for s in running)
    in_all = max(0, usual + foresight.at_home(running) - config.reserve)
    expected = foresight.expected_kvs(running)
    return Headroom(free - reserve - prompts, usual - config.reserve - prompts, in_all, expected)


def _may_begin(state: State, sequence: Sequence, room: Headroom) -> bool:
    """True if a sequence too large for this instance is admitted."""
    if sequence.id not in state.orders.begin:
        return False
    missing = state.foresight.missing(sequence, sequence.length + 1)
    return min(missing, state.config.first_chunk) <= room.for_large or not room.expected


def _oldest_blocked(
    state: State, sequence: Sequence, room: Headroom, blocked: Blocked | None
) -> Blocked | None:
    """None if the sequence fits without a loan; if not, the oldest that does not: `blocked`, or if
    that is None, this one."""
    if not room.expected:
        return None  # With nobody beside it, it borrows what it lacks, or swaps.
    foresight = state.foresight
    lacking = foresight.missing(sequence, sequence.length + 1) - room.now
    if lacking > 0 and blocked:
        return blocked
    kv = foresight.expected_kv(sequence)
    first = [blocked.kv] if blocked else []
    over = foresight.peak([*room.expected, *first, kv], kv.end) - room.in_all
    if lacking <= 0 and over <= 0:
        return None
    if blocked:
        return blocked
    kv = kv._replace(tokens=sequence.length)  # Who shares with it may have ended.
    begins = kv.at(foresight.start(room.expected, kv, room.in_all))
    return Blocked(begins, max(lacking, math.ceil(over)))
