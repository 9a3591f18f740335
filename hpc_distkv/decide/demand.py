"""What an instance asks of others, and what it offers them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from hpc_distkv.control.assign.work import work
from hpc_distkv.control.messages.reports import Large
from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.decide.admission import CANDIDATES, NOTHING_WAITS, Admission
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.foresight import Foresight
from hpc_distkv.decide.moves import Moves
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.swap import Swaps
from hpc_distkv.memory.rmanager import RManager

GROWTH_ROUNDS = 3
"""Control rounds in which rows grow before rBlocks that are asked for now can be used."""
LEAST_GROWTH, MOST_GROWTH = 16, 256
"""Bounds of the decode tokens per row that are foreseen when memory is asked for."""
STARVED_GROWTH = 8
"""A starved row asks for room to grow by 1/8 of its length: others are preempted, and computed
again, only as often as that pays."""
EXCHANGE_TOKENS = 10.0
"""Prompt tokens computed in the time that remote rBlocks add to a step, until it was measured."""

NOTHING_PLANNED: Mapping[int, int] = {}


class Demand(NamedTuple):
    """What a report says of memory."""

    wanted: int
    wanted_for: int
    largest: int
    """rBlocks that the largest sequence that wants any may come to need."""
    starved: bool
    lendable: int


class Demands:
    """Weighs what the sequences of an instance come to need against what it has."""

    def __init__(
        self,
        rmanager: RManager,
        config: EngineConfig,
        admission: Admission,
        moves: Moves,
        swaps: Swaps,
        foresight: Foresight,
        waiting: list[Sequence],
        running: list[Sequence],
    ) -> None:
        """`waiting` and `running`: the scheduler's own lists."""
        self.exchange_tokens = EXCHANGE_TOKENS
        """Prompt tokens computed in the time that remote rBlocks add to a step."""
        self._growth = MOST_GROWTH // 4
        """Tokens that a row is foreseen to grow by."""
        self._outlook = NOTHING_WAITS
        self._rm, self._config, self._admission = rmanager, config, admission
        self._moves, self._swaps, self._foresight = moves, swaps, foresight
        self._waiting, self._running = waiting, running

    def grown(self, steps: int) -> None:
        """A control round took so many steps."""
        foreseen = GROWTH_ROUNDS * steps
        self._growth = max(LEAST_GROWTH, min(MOST_GROWTH, (self._growth + foreseen) // 2))

    def weigh(self, starved: bool) -> Demand:
        """Foreseen need against what there is. Credit that is not needed is given back. `starved`:
        whether the oldest that runs cannot go on."""
        self._outlook = self._admission.outlook(self._waiting, self._running)
        credit = self._usable_credit()
        if self._config.policy.lending and credit < self._rm.credit:
            self._moves.forget_plans()
            self._return_credit(self._rm.credit - credit)
        held = self._rm.usable + (credit if self._config.policy.lending else 0)
        if starved and self._running:
            oldest = self._running[0]
            growth = max(self._growth, oldest.length // STARVED_GROWTH)
            missing = self._foresight.missing(oldest, oldest.length + growth)
            largest = self._config.blocks(oldest.final_len)
            return Demand(max(1, missing - held), oldest.id, largest, True, 0)
        following = self.next_to_begin()
        need = self._admission.reserve if self._running else 0
        wanted, wanted_for, largest = 0, NOBODY, 0
        for sequence in (*self._running, *following):
            need += self._foresight.missing(sequence, self.foreseen(sequence))
            if need > held and self.worth_borrowing(sequence):
                wanted, wanted_for = need - held, min(wanted_for, sequence.id)
                largest = max(largest, self._config.blocks(sequence.final_len))
        if wanted:
            return Demand(wanted, wanted_for, largest, False, 0)
        if self._config.policy.lending:
            shed = self._moves.sheddable() if self.movable() else {}
            lacking = max(0, need - self._rm.usable)
            self._return_credit(self._rm.credit - lacking - sum(shed.values()), shed)
        if not self._config.policy.sharing:
            return Demand(0, NOBODY, 0, False, 0)
        rest = max(0, self._rm.usable + self._rm.credit - need)
        return Demand(0, NOBODY, 0, False, min(rest, self._lendable()))

    @property
    def large(self) -> list[Large]:
        """Sequences too large for this instance: all that run, and the oldest that wait."""
        if not self._config.policy.planner:
            return []
        large, awaited = self._admission.large, self._rm.prefixes.awaited
        waiting = (s for s in self._waiting if large(s) and not awaited(s.keys))
        counted: set[int] = set()
        rows = (*filter(large, self._running), *islice(waiting, CANDIDATES))
        return [self._large(sequence, counted) for sequence in rows]

    @property
    def lacking(self) -> int:
        """rBlocks that the oldest waiting sequence lacks to begin beside those that run."""
        return self._outlook.lacking if self._running else 0

    @property
    def longest(self) -> int:
        """Sealed rBlocks at home of the running sequence, or the prefix, that has most of them."""
        return max(self._moves.sealed(self._running).values(), default=0)

    def next_waiting(self) -> list[Sequence]:
        """The sequence that is next to be admitted, if any may be."""
        if self._admission.closed or len(self._running) >= self._config.max_num_seqs:
            return []
        following = self._admission.following(self._waiting)
        return [following] if following else []

    def next_to_begin(self) -> list[Sequence]:
        """The same. With a planner, one that has to wait until others end takes nothing now."""
        waits = self._outlook.blocked if self._config.policy.planner else None
        return [sequence for sequence in self.next_waiting() if sequence is not waits]

    def foreseen(self, sequence: Sequence) -> int:
        """Tokens for which memory is asked for now."""
        return sequence.length + self._growth

    def worth_borrowing(self, sequence: Sequence) -> bool:
        """Whether a sequence that lacks memory had better get it elsewhere. It must if it does not
        fit here or runs alone. Otherwise, with a planner, a waiting one waits, and a running one
        has the youngest preempted if that costs less: to compute its tokens again once, against an
        exchange in every step that is left."""
        if not self._config.policy.planner or not self._running or self._running == [sequence]:
            return True
        if self._admission.large(sequence):
            return True
        youngest = self._running[-1]
        if sequence.id not in self._rm.tables or sequence is youngest:
            return False
        left = sequence.final_len - sequence.length
        return self._swaps.cost(youngest) > self.exchange_tokens * left

    def _lendable(self) -> int:
        """Room that nobody here needs: not what runs, nor what begins next, nor what new rows begin
        with. While an older request is starved elsewhere, only what is older counts; and what was
        to be kept for loans is not for those that wait."""
        before, keep = self._admission.before, self._admission.keep
        need = 0 if keep or before < NOBODY else self._admission.first_chunk
        claims = self._foresight.claims([s for s in self._running if s.id <= before])
        if not keep:
            claims += self._outlook.claims
        growth = self._foresight.peak(claims) - self._foresight.at_home(self._running)
        return max(0, int(self._rm.usable - need - max(0, growth)))

    def _usable_credit(self) -> int:
        """Credit that can help: through it flows what is sealed at home, so without room or sealed
        rBlocks at home it is worth nothing."""
        return self._rm.credit if self._rm.usable > 0 or self.movable() else 0

    def movable(self) -> bool:
        """Whether any rBlock may travel."""
        return any(self._moves.sealed(self._running).values())

    def _return_credit(self, surplus: int, planned: Mapping[int, int] = NOTHING_PLANNED) -> None:
        """Give back `surplus` of the credit, but not what is `planned` to be used (by creditor)."""
        for creditor, debt in list(self._rm.debts.items()):
            blocks = max(0, min(debt.credit - planned.get(creditor, 0), surplus))
            self._rm.return_credit(creditor, blocks)
            surplus -= blocks

    def _large(self, sequence: Sequence, counted: set[int]) -> Large:
        """`counted`: prefixes of others, which count once."""
        table, end = self._rm.tables.get(sequence.id), self._foresight.expected_end(sequence)
        shared = [p for p in self._rm.prefixes.chain(sequence.id) if p.id not in counted]
        counted.update(prefix.id for prefix in shared)
        held = sum(part.held for part in (*shared, table) if part)
        done = sequence.length - self._foresight.uncomputed(sequence)
        left = work(done, sequence.length, self._config.attention_tokens)
        return Large(
            sequence.id,
            begun=bool(table) or sequence.id in self._admission.begin,
            held=held,
            blocks=held + self._foresight.missing(sequence, int(end)),
            prompt=left if sequence.length > done + 1 else 0.0,
            output=end - sequence.length,
        )
