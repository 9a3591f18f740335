"""Which waiting sequence is admitted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpc_distkv.decide.foresight import ExpectedKv
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.state import CANDIDATES, NOTHING_WAITS, Outlook, State, too_large

REFUSED_STEPS = 8
"""Steps after which refused sequences are looked at again though nobody came or went: a sequence
admitted later has grown less when others end."""


@dataclass
class Headroom:
    """rBlocks left beside the running sequences, and the expected KV that takes them."""

    for_large: int
    """Now, for a sequence that borrows."""
    now: int
    """Now, for any other."""
    in_time: int
    """For all sequences together, as the running ones end."""
    expected: list[ExpectedKv]
    """Of the running sequences, and of those admitted."""
    blocked: ExpectedKv | None = None
    """Of the oldest sequence that cannot be admitted, from when it is expected to begin."""
    lacking: int = 0
    """rBlocks that sequence lacks to be admitted now; 0: there is none."""


class Admission:
    """Admits the oldest waiting sequence whose expected KV (prompt plus predicted output) fits, now
    and while all running sequences grow. The oldest that does not fit has a place in time, as soon
    as enough running sequences have ended; younger ones pass it if they leave it that place (EASY
    backfilling, Lifka 1995). A sequence too large for this instance is admitted when the gManager
    says so, and one whose prefix is being computed by another when that prefix is there.

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
        room = _room(state)
        for sequence in waiting[:CANDIDATES]:
            if sequence.id > orders.before:
                break
            if state.rm.prefixes.awaited(sequence.keys):
                continue
            if _fits(state, sequence, room):
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
    expected, blocked = [], None
    for sequence in waiting[: min(CANDIDATES, seats)]:
        if sequence.id > orders.before:
            break
        if too_large(state, sequence) or state.rm.prefixes.awaited(sequence.keys):
            continue
        if _fits_alone(state, sequence, room):
            room.now -= foresight.missing(sequence, sequence.length + 1)
            expected.append(foresight.expected_kv(sequence))
            room.expected.append(expected[-1])
        elif room.blocked and not blocked:
            blocked = sequence
            expected.append(room.blocked)
    return Outlook(expected, blocked, room.lacking)


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
    prompts = sum(foresight.missing(row, row.length + 1) for row in running)
    in_time = max(0, usual + foresight.at_home(running) - config.reserve)
    expected = foresight.expected_kvs(running)
    return Headroom(free - reserve - prompts, usual - config.reserve - prompts, in_time, expected)


def _fits(state: State, sequence: Sequence, room: Headroom) -> bool:
    if not too_large(state, sequence):
        return _fits_alone(state, sequence, room)
    if sequence.id not in state.orders.begin:
        return False
    missing = state.foresight.missing(sequence, sequence.length + 1)
    return min(missing, state.config.first_chunk) <= room.for_large or not room.expected


def _fits_alone(state: State, sequence: Sequence, room: Headroom) -> bool:
    """True if the sequence fits without a loan. If not, and it is the first, it is the one that is
    `blocked`."""
    if not room.expected:
        return True  # With nobody beside it, it borrows what it lacks, or swaps.
    foresight = state.foresight
    lacking = foresight.missing(sequence, sequence.length + 1) - room.now
    if lacking > 0 and room.blocked:
        return False
    kv = foresight.expected_kv(sequence)
    first = [room.blocked] if room.blocked else []
    over = foresight.peak([*room.expected, *first, kv], kv.end) - room.in_time
    if lacking <= 0 and over <= 0:
        return True
    if not room.blocked:
        kv = kv._replace(tokens=sequence.length)  # Who shares with it may have ended.
        room.blocked = kv.at(foresight.start(room.expected, kv, room.in_time))
        room.lacking = max(lacking, math.ceil(over))
    return False
