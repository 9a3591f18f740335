"""Which rows run in a step, what gives way when memory is short, and what moves out."""

from __future__ import annotations

import bisect
from itertools import islice
from typing import NamedTuple

from hpc_distkv.control.messages import NOBODY
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.memory.rmanager import Move, RManager

GROWTH_TOKENS = 64
"""Decode tokens foreseen when memory is asked for: what a row grows by until a grant arrives."""
STARVED_GROWTH = 8
"""A starved row asks for room to grow by 1/8 of its length: others give way, and are computed
again, only as often as that pays."""
PATIENCE = 2
"""Answers after which a sequence that lacks memory no longer waits for a grant."""


class Row(NamedTuple):
    """The next `tokens` tokens of a sequence."""

    sequence: Sequence
    tokens: int


class Plan(NamedTuple):
    """One step of one instance."""

    rows: list[Row]
    """Ascending by request."""
    moves: list[Move]


class Demand(NamedTuple):
    """What a report says of memory."""

    wanted: int
    wanted_for: int
    starved: bool
    lendable: int


class Scheduler:
    """Continuous batching with chunked prefill, oldest first. Owner of the waiting and running
    sequences; every rBlock it hands out it takes from its RManager. Pure.

    Both lists ascend by age. When a sequence lacks an rBlock it first waits for credit it may hope
    for, then lets the youngest running sequence give way (to be recomputed), and if it is itself
    the youngest it stalls. The oldest one stalled at home without hope is reported as starved; the
    gManager then makes room elsewhere. Hope is bounded: it ends with a denial, or when a shortage
    has outlasted `PATIENCE` answers.
    """

    def __init__(self, rmanager: RManager, config: EngineConfig) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._rm = rmanager
        self._config = config
        self._admit_before = NOBODY
        self._starved = False
        self._short = False
        self._short_answers = 0
        self._denied = not config.lending
        chunk = config.blocks(config.max_num_batched_tokens)
        self._reserve = min(chunk, max(1, config.num_blocks // 100))
        """Room that stays free when a row is admitted, for those that run to grow into."""
        self._first_chunk = min(chunk, max(1, config.num_blocks // 8))
        """Room that is not lent, so that rows assigned here can begin, unless one starves. At
        least the reserve."""

    # -- between steps --------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A newly assigned sequence."""
        bisect.insort(self.waiting, sequence, key=lambda s: s.id)

    def finish(self, sequence: Sequence) -> None:
        """The sequence has all its output; its rBlocks go back, also to its creditors."""
        self.running.remove(sequence)
        self._rm.close(sequence.id)

    def give_way(self, request: int) -> None:
        """The gManager preempts `request`, if it still runs."""
        for sequence in self.running:
            if sequence.id == request:
                self._preempt(sequence)
                return

    def answered(self, asked: int, granted: int, admit_before: int) -> None:
        """What a control round brought: the last report asked for `asked` rBlocks."""
        self._admit_before = admit_before
        self._short_answers = self._short_answers + 1 if self._short else 0
        if self._config.lending:
            self._denied = asked > 0 and granted == 0

    def demand(self) -> Demand:
        """Foreseen need against what there is. Credit that is not needed is given back."""
        credit = self._usable_credit()
        self._return_credit(self._rm.credit - credit)
        held = self._rm.usable + credit
        if self._starved and self.running:
            oldest = self.running[0]
            growth = max(GROWTH_TOKENS, len(oldest.tokens) // STARVED_GROWTH)
            missing = self._missing(oldest, len(oldest.tokens) + growth)
            return Demand(max(1, missing - held), oldest.id, True, 0)
        soon = (*self.running, *self._next_waiting())
        need = self._reserve if soon else 0
        wanted_for = NOBODY
        for sequence in soon:
            need += self._missing(sequence, len(sequence.tokens) + GROWTH_TOKENS)
            if need > held:
                wanted_for = min(wanted_for, sequence.id)
        if need > held:
            return Demand(need - held, wanted_for, False, 0)
        self._return_credit(self._rm.usable + self._rm.credit - need)
        return Demand(0, NOBODY, False, self._lendable())

    @property
    def has_prompts(self) -> bool:
        """Whether prompts are left to compute in the next steps."""
        return bool(self.waiting) or any(s.remaining > 1 for s in self.running)

    def room(self) -> tuple[int, int]:
        """Rows and prompt tokens that may be assigned: enough to keep the batch full until the
        next rounds, no more, so that rows stay free to go where there is time."""
        if self._rm.usable < self._first_chunk and (self.waiting or not self.running):
            return 0, 0
        queued = sum(sequence.remaining for sequence in self.waiting)
        rows = self._config.max_num_seqs - len(self.running) - len(self.waiting)
        return max(0, rows), max(0, 2 * self._config.max_num_batched_tokens - queued)

    # -- a step ---------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The next step: decodes first, then prefill chunks up to the token budget."""
        self._starved = self._short = False
        rows: dict[int, Row] = {}
        self._plan_decodes(rows)
        self._plan_prefills(rows, self._config.max_num_batched_tokens - len(rows))
        return Plan([rows[request] for request in sorted(rows)], self._move_out())

    def _plan_decodes(self, rows: dict[int, Row]) -> None:
        for sequence in [s for s in self.running if s.remaining == 1]:
            # An older one may have made it give way meanwhile.
            if sequence.id in self._rm.tables and self._make_room(sequence, 1, rows):
                rows[sequence.id] = Row(sequence, 1)

    def _plan_prefills(self, rows: dict[int, Row], budget: int) -> None:
        prefills = [s for s in self.running if s.remaining > 1]
        while budget > 0:
            sequence = prefills.pop(0) if prefills else self._admit()
            if sequence is None:
                return
            if sequence.id not in self._rm.tables:
                continue
            tokens = min(sequence.remaining, budget, self._fit(sequence))
            if self._make_room(sequence, tokens, rows):
                rows[sequence.id] = Row(sequence, tokens)
                budget -= tokens
            elif not prefills:
                return

    def _admit(self) -> Sequence | None:
        """Let the oldest waiting sequence run if all prompts that run then have room, or if it is
        the only one."""
        if not self.waiting or len(self.running) >= self._config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        if sequence.id >= self._admit_before:
            return None
        if self.running:
            need = self._reserve + self._config.blocks(len(sequence.tokens) + 1)
            need += sum(self._missing(other, len(other.tokens) + 1) for other in self.running)
            if need > self._rm.usable + self._rm.credit:
                return None
        # A victim of another instance's starved row may be older than what runs here by now.
        bisect.insort(self.running, self.waiting.pop(0), key=lambda s: s.id)
        self._rm.open(sequence.id)
        return sequence

    def _fit(self, sequence: Sequence) -> int:
        """Tokens the sequence can compute with what is free now, at least one."""
        held = self._rm.tables[sequence.id].blocks
        spare = max(0, self._rm.usable - (self._reserve if len(self.running) > 1 else 0))
        return max(1, (held + spare) * self._config.block_size - sequence.computed)

    def _make_room(self, sequence: Sequence, count: int, rows: dict[int, Row]) -> bool:
        """Give the sequence the rBlocks for `count` tokens, preempting younger ones if need be."""
        needed = self._missing(sequence, sequence.computed + count)
        while self._rm.usable < needed:
            self._short = True
            if self._hopes():
                return False
            youngest = self.running[-1]
            if youngest is sequence:
                self._starved |= sequence is self.running[0]
                return False
            self._preempt(youngest)
            rows.pop(youngest.id, None)
        self._rm.grow(sequence.id, needed)
        return True

    def _hopes(self) -> bool:
        """Whether rBlocks will come without anybody giving way."""
        if self._rm.credit and self._movable():
            return True
        return not self._denied and self._short_answers < PATIENCE

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._rm.close(sequence.id)
        sequence.computed = 0
        self.add(sequence)
        self.preemptions += 1

    # -- foresight ------------------------------------------------------------------------------

    def _next_waiting(self) -> list[Sequence]:
        """The sequence that is next to be admitted, if any may be."""
        if len(self.running) >= self._config.max_num_seqs:
            return []
        return [sequence for sequence in self.waiting[:1] if sequence.id < self._admit_before]

    def _lendable(self) -> int:
        """Room that nobody here needs: not what runs nor what waits for a seat, nor what new rows
        begin with. While an older request is starved elsewhere, only what is older counts."""
        waiting = self.waiting[: self._config.max_num_seqs - len(self.running)]
        need = self._first_chunk if self._admit_before == NOBODY else 0
        for sequence in (*self.running, *waiting):
            if sequence.id <= self._admit_before:
                need += self._missing(sequence, len(sequence.tokens) + GROWTH_TOKENS)
        return max(0, self._rm.usable - need)

    def _usable_credit(self) -> int:
        """Credit that can help: through it flows what is sealed at home, so without room or sealed
        rBlocks at home it is worth nothing."""
        return self._rm.credit if self._rm.usable or self._movable() else 0

    def _movable(self) -> bool:
        return any(self._sealed(sequence) for sequence in self.running)

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        """rBlocks the sequence lacks for its first `tokens` tokens."""
        table = self._rm.tables.get(sequence.id)
        held = table.blocks if table else 0
        return max(0, self._config.blocks(min(tokens, sequence.final_len)) - held)

    def _sealed(self, sequence: Sequence) -> int:
        """Sealed rBlocks of the sequence that are at home: they may travel."""
        sealed = sequence.computed // self._config.block_size
        return bisect.bisect_left(self._rm.tables[sequence.id].indices, sealed)

    def _return_credit(self, surplus: int) -> None:
        for creditor, debt in list(self._rm.debts.items()):
            blocks = max(0, min(debt.credit, surplus))
            self._rm.return_credit(creditor, blocks)
            surplus -= blocks

    def _move_out(self) -> list[Move]:
        """Moves that free what the next two steps need: the oldest rBlocks of the longest
        sequences, to a creditor that hosts the sequence already if there is one."""
        rm = self._rm
        if not rm.credit:
            return []
        ahead = 2 * self._config.max_num_batched_tokens
        short = self._reserve - rm.usable
        for sequence in (*self.running, *self._next_waiting()):
            target = min(len(sequence.tokens) + 8, sequence.computed + ahead)
            short += self._missing(sequence, target)
        short = min(short, 2 * self._config.blocks(ahead))
        moves: list[Move] = []
        for sequence in sorted(self.running, key=self._sealed, reverse=True):
            table = rm.tables[sequence.id]
            for index in islice(table.indices, self._sealed(sequence)):
                if len(moves) >= short or not rm.credit:
                    return moves
                creditor = max(
                    (c for c, debt in rm.debts.items() if debt.credit),
                    key=lambda c: (c in table.remote, rm.debts[c].credit),
                )
                moves.append(rm.move_out(sequence.id, index, creditor))
        return moves
