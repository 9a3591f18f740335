"""Which waiting row begins."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.foresight import Claim, Foresight
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.memory.rmanager import RManager

CANDIDATES = 16
"""Waiting sequences that are looked at in a step."""
REFUSED_STEPS = 8
"""Steps after which those that were refused are looked at again though nobody came or went: one
that begins later has grown less when others end."""


@dataclass
class Room:
    """What is left beside the rows that run, in rBlocks, and who takes it."""

    for_large: int
    """Now, for one that borrows."""
    now: int
    """Now, for any other."""
    in_time: int
    """For all rows together, as those that run end."""
    claims: list[Claim]
    """Of the rows that run, and of those that begin."""
    blocked: Claim | None = None
    """The place in time of the oldest row that cannot begin."""
    lacking: int = 0
    """What that row lacks to begin now; 0: there is none."""


class Outlook(NamedTuple):
    """What comes of the rows that wait."""

    claims: list[Claim]
    """Of those that can begin now, and the place in time of the oldest that cannot."""
    blocked: Sequence | None
    """The latter."""
    lacking: int
    """rBlocks that it lacks to begin now."""


NOTHING_WAITS = Outlook([], None, 0)


class Admission:
    """Admits the oldest waiting sequence for which there is room: now, and as all that run grow,
    by what is expected of their outputs. One for which there is none has a place in time, as soon
    as enough of what runs has ended; younger ones pass it if they do not take that place (EASY
    backfilling, Lifka 1995). One that is too large for this instance alone begins on the
    gManager's word, and one whose prompt goes on with what another is computing when that is
    there.
    """

    def __init__(self, rmanager: RManager, config: EngineConfig, foresight: Foresight) -> None:
        self.before = NOBODY
        """No sequence younger than this may begin."""
        self.closed = False
        """No sequence may begin any more."""
        self.keep = 0
        """rBlocks to leave free for loans to come."""
        self.reserve = config.reserve
        """Room that stays free when a row is admitted, for those that run to grow into."""
        chunk = config.blocks(config.max_num_batched_tokens)
        self.first_chunk = min(chunk, max(1, config.num_blocks // 8))
        """Room that is not lent, so that rows assigned here can begin, unless one starves. At
        least the reserve."""
        self.begin: set[int] = set()
        """Sequences too large for this instance that may begin all the same, and borrow."""
        self._rm, self._config, self._foresight = rmanager, config, foresight
        self._refused: tuple[object, ...] = ()
        """The state in which nobody could begin."""
        self._refused_steps = 0
        """Times that it was not looked at again."""

    def next(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> Sequence | None:
        """The sequence of `waiting` that begins now; both lists ascend by age."""
        if self.closed or not waiting or len(running) >= self._config.max_num_seqs:
            return None
        state = self._state(waiting, running)
        if running and state == self._refused and self._refused_steps < REFUSED_STEPS:
            self._refused_steps += 1
            return None
        room = self._room(waiting, running)
        for sequence in waiting[:CANDIDATES]:
            if sequence.id > self.before:
                break
            if self._rm.prefixes.awaited(sequence.keys):
                continue
            if self._may_begin(sequence, room):
                return sequence
        self._refused, self._refused_steps = state, 0
        return None

    def following(self, waiting: Rows[Sequence]) -> Sequence | None:
        """The oldest of the waiting sequences, for which memory may be asked; not while another
        computes its beginning."""
        for sequence in waiting[:CANDIDATES]:
            if sequence.id > self.before:
                return None
            if sequence.id in self.begin or not self.large(sequence):
                return None if self._rm.prefixes.awaited(sequence.keys) else sequence
        return None

    def outlook(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> Outlook:
        """What comes of the waiting sequences, those too large for this instance left out."""
        if self.closed or not waiting:
            return NOTHING_WAITS
        room = self._room(waiting, running)
        seats = max(0, self._config.max_num_seqs - len(running))
        claims, blocked = [], None
        for sequence in waiting[: min(CANDIDATES, seats)]:
            if sequence.id > self.before:
                break
            if self.large(sequence) or self._rm.prefixes.awaited(sequence.keys):
                continue
            if self._fits(sequence, room):
                room.now -= self._foresight.missing(sequence, sequence.length + 1)
                claims.append(self._foresight.claim(sequence))
                room.claims.append(claims[-1])
            elif room.blocked and not blocked:
                blocked = sequence
                claims.append(room.blocked)
        return Outlook(claims, blocked, room.lacking)

    def large(self, sequence: Sequence) -> bool:
        """Whether the sequence can't run with this instance's memory alone, and the gManager looks
        after such."""
        own = self._config.num_blocks - self._rm.lender.lent - self.reserve
        return self._config.policy.planner and self._config.blocks(sequence.length + 1) > own

    def _state(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> tuple[object, ...]:
        """All that decides on who may begin, but for the growth that was foreseen."""
        rm = self._rm
        memory = (
            rm.borrower.credit,
            rm.lender.promised,
            rm.lender.lent,
            rm.borrower.borrowed,
            rm.prefixes.computing,
        )
        ids = (sequence.id for sequence in (*running, *waiting[:CANDIDATES]))
        return (self.before, self.keep, len(self.begin), *memory, len(running), *ids)

    def _room(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> Room:
        """What is the same for all that wait."""
        rm, foresight = self._rm, self._foresight
        credit = rm.borrower.credit if self._config.policy.lending else 0
        free = rm.slots.usable + credit
        usual = free - self.keep
        if any(map(self.large, waiting)):
            usual -= credit
        reserve = self.reserve if running else 0
        prompts = sum(foresight.missing(row, row.length + 1) for row in running)
        in_time = max(0, usual + foresight.at_home(running) - self.reserve)
        claims = foresight.claims(running)
        return Room(free - reserve - prompts, usual - self.reserve - prompts, in_time, claims)

    def _may_begin(self, sequence: Sequence, room: Room) -> bool:
        if self.large(sequence):
            missing = self._foresight.missing(sequence, sequence.length + 1)
            fits = min(missing, self.first_chunk) <= room.for_large or not room.claims
            return sequence.id in self.begin and fits
        return self._fits(sequence, room)

    def _fits(self, sequence: Sequence, room: Room) -> bool:
        if not room.claims:
            return True  # alone it gets what it lacks from others, or makes room as it goes
        lacking = self._foresight.missing(sequence, sequence.length + 1) - room.now
        if lacking > 0 and room.blocked:
            return False
        claim = self._foresight.claim(sequence)
        first = [room.blocked] if room.blocked else []
        over = self._foresight.peak([*room.claims, *first, claim], claim.end) - room.in_time
        if lacking <= 0 and over <= 0:
            return True
        if not room.blocked:
            claim = claim._replace(tokens=sequence.length)  # Who shares with it may have ended.
            room.blocked = claim.at(self._foresight.start(room.claims, claim, room.in_time))
            room.lacking = max(lacking, math.ceil(over))
        return False
