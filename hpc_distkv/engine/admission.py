"""Which waiting row begins."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

from hpc_distkv.control.messages import NOBODY
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.foresight import Claim, Foresight
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.memory.rmanager import RManager

CANDIDATES = 16
"""Waiting sequences that are looked at in a step."""
REFUSED_STEPS = 8
"""Steps after which those that were refused are looked at again though nobody came or went: one
that begins later has grown less when others end."""


class Room(NamedTuple):
    """What is left beside the rows that run, in rBlocks."""

    for_large: int
    """Now, for one that waited for credit."""
    now: int
    """Now, for any other."""
    in_time: int
    """For all rows together, as those that run end."""
    claims: list[Claim]
    """Of the rows that run."""


class Admission:
    """Admits the oldest waiting sequence for which there is room: now, and as all that run grow,
    by what is expected of their outputs. One for which there is none has a place in time, as soon
    as enough of what runs has ended; younger ones pass it if they do not take that place (EASY
    backfilling, Lifka 1995). One that is too large for this instance alone waits until it has
    credit for all of itself.
    """

    def __init__(self, rmanager: RManager, config: EngineConfig, foresight: Foresight) -> None:
        self.before = NOBODY
        """No sequence younger than this may begin."""
        self.keep = 0
        """rBlocks to leave free for loans to come."""
        chunk = config.blocks(config.max_num_batched_tokens)
        self.reserve = min(chunk, max(1, config.num_blocks // 100))
        """Room that stays free when a row is admitted, for those that run to grow into."""
        self._rm, self._config, self._foresight = rmanager, config, foresight
        self._refused: tuple[object, ...] = ()
        """The state in which nobody could begin."""
        self._refused_steps = 0
        """Times that it was not looked at again."""
        self._blocked: Claim | None = None
        """The place in time of the oldest one that could not."""

    def next(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> Sequence | None:
        """The sequence of `waiting` that begins now; both lists ascend by age."""
        if not waiting or len(running) >= self._config.max_num_seqs:
            return None
        state = self._state(waiting, running)
        if running and state == self._refused and self._refused_steps < REFUSED_STEPS:
            self._refused_steps += 1
            return None
        room = self._room(waiting, running)
        self._blocked = None
        for sequence in waiting[:CANDIDATES]:
            if sequence.id > self.before:
                break
            if self._may_begin(sequence, room):
                return sequence
        self._refused, self._refused_steps = state, 0
        return None

    def large(self, sequence: Sequence) -> bool:
        """Whether the planner has to find room elsewhere for the sequence before it can run."""
        own = self._config.num_blocks - self._rm.lent - self.reserve
        return self._config.policy.planner and self._config.blocks(sequence.length + 1) > own

    def _state(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> tuple[object, ...]:
        """All that decides on who may begin, but for the growth that was foreseen."""
        rm = self._rm
        numbers = (self.before, self.keep, rm.credit, rm.promised, rm.lent, rm.borrowed)
        ids = (sequence.id for sequence in (*running, *waiting[:CANDIDATES]))
        return (*numbers, len(running), *ids)

    def _room(self, waiting: Rows[Sequence], running: Rows[Sequence]) -> Room:
        """What is the same for all that wait."""
        rm, foresight = self._rm, self._foresight
        free = rm.usable + rm.credit
        usual = free - self.keep
        if any(map(self.large, waiting)):
            usual -= rm.credit
        reserve = self.reserve if running else 0
        prompts = sum(foresight.missing(row, row.length + 1) for row in running)
        in_time = max(0, usual + foresight.at_home(running) - self.reserve)
        claims = [foresight.claim(row) for row in running]
        return Room(free - reserve - prompts, usual - self.reserve - prompts, in_time, claims)

    def _may_begin(self, sequence: Sequence, room: Room) -> bool:
        if self.large(sequence):
            end = int(self._foresight.expected_end(sequence))
            return self._foresight.missing(sequence, end) <= room.for_large
        return not room.claims or self._fits(sequence, room)

    def _fits(self, sequence: Sequence, room: Room) -> bool:
        now = self._foresight.missing(sequence, sequence.length + 1) <= room.now
        if not now and self._blocked:
            return False
        claim = self._foresight.claim(sequence)
        first = [self._blocked] if self._blocked else []
        if now and self._foresight.peak([*room.claims, *first, claim]) <= room.in_time:
            return True
        if not self._blocked:
            self._blocked = claim.at(self._foresight.start(room.claims, claim, room.in_time))
        return False
