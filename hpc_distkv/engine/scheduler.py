"""Which rows run in a step, what gives way when memory is short, and what moves out."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from itertools import islice
from typing import NamedTuple

from hpc_distkv.control.messages import NOBODY, Answer, Large
from hpc_distkv.control.work import STEP_TOKENS, work
from hpc_distkv.engine.admission import NOTHING_WAITS, Admission
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.demand import Demand
from hpc_distkv.engine.foresight import Foresight
from hpc_distkv.engine.migration import Migrations
from hpc_distkv.engine.moves import Moves
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.engine.swap import GROWTH_TOKENS, Swaps
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager

GROWTH_ROUNDS = 3
"""Control rounds in which rows grow before rBlocks that are asked for now can be used."""
LEAST_GROWTH, MOST_GROWTH = 16, 256
"""Bounds of the decode tokens per row that are foreseen when memory is asked for."""
STARVED_GROWTH = 8
"""A starved row asks for room to grow by 1/8 of its length: others give way, and are computed
again, only as often as that pays."""
EXCHANGE_TOKENS = 10.0
"""Prompt tokens computed in the time that remote rBlocks add to a step, until it was measured."""
GUEST_STEPS = 5
"""How many times its fixed time a step may compute prompts while guests are hosted: they wait for
its operators, and shorter steps waste time of their own."""
PATIENCE = 2
"""Answers after which a sequence that lacks memory no longer waits for a grant."""


NOTHING_PLANNED: Mapping[int, int] = {}


class Row(NamedTuple):
    """The next `tokens` tokens of a sequence."""

    sequence: Sequence
    tokens: int


class Plan(NamedTuple):
    """One step of one instance."""

    rows: list[Row]
    """Ascending by request."""
    moves: list[Move]
    """rBlocks that leave."""
    recalls: list[Move]
    """rBlocks that come home."""
    leaving: list[Sequence]
    """Sequences that are handed over after this step."""
    to_host: Rows[Move] = ()
    """rBlocks that go to the host's memory."""
    from_host: Rows[Move] = ()
    """rBlocks that come home from there."""

    @property
    def idle(self) -> bool:
        """Whether nothing is computed, nor copied within the rank."""
        return not (self.rows or self.to_host or self.from_host)


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
        self.preemptions = self.stalls = self.cached_tokens = 0
        self.exchange_tokens = EXCHANGE_TOKENS
        """Prompt tokens computed in the time that remote rBlocks add to a step."""
        self.step_tokens = STEP_TOKENS
        """Prompt tokens computed in the fixed time of a step."""
        self._rm = rmanager
        self._config = config
        self.foresight = Foresight(rmanager, config)
        self._admission = Admission(rmanager, config, self.foresight)
        self._outlook = NOTHING_WAITS
        self._starved = False
        self.short = False
        """Whether memory was short in the last step that was planned."""
        self._ahead = False
        self._short_answers = self._short_steps = 0
        """Answers and steps since there was enough memory."""
        self._idle = True
        """Whether nothing ran in the last step."""
        self._migrations = Migrations(rmanager, config) if config.policy.migrate else None
        self._steps = 0
        self._growth = MOST_GROWTH // 4
        """Tokens that a row is foreseen to grow by."""
        self._moves = Moves(rmanager, config)
        self.swaps = Swaps(rmanager, config, self.foresight)
        self._denied = not config.policy.sharing

    # -- between steps --------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A sequence that has to begin."""
        sequence.keys = sequence.keys or self._config.prefix_keys(sequence.request)
        bisect.insort(self.waiting, sequence, key=lambda s: s.id)

    def finish(self, sequence: Sequence, in_use: bool = False) -> None:
        """The sequence has all its output; its rBlocks go back, also to its creditors. If they are
        `in_use`, they are to be closed later."""
        self.running.remove(sequence)
        if not in_use:
            self._rm.close(sequence.id)
        self.foresight.outputs.add(sequence.output_len, sequence.request.sampling.max_tokens)

    def adopt(self, sequence: Sequence) -> None:
        """A running sequence that another instance handed over, with its rBlocks."""
        bisect.insort(self.running, sequence, key=lambda s: s.id)

    def hand_over(self, sequence: Sequence) -> None:
        """The sequence runs elsewhere from now on."""
        self.running.remove(sequence)
        self._rm.hand_over(sequence.id)

    def give_back(self, rows: int) -> list[Sequence]:
        """The youngest waiting sequences, up to `rows`, that were not begun: they go elsewhere."""
        aside, large = self._rm.host_space.aside, self._admission.large
        fresh = [s for s in self.waiting if s.fresh and s.id not in aside and not large(s)]
        given = fresh[max(0, len(fresh) - rows) :]
        for sequence in given:
            self.waiting.remove(sequence)
        return given

    def apply(self, answer: Answer, asked: int) -> None:
        """What a control round brought: the last report asked for `asked` rBlocks."""
        self._admission.before = answer.admit_before
        self._admission.closed = self._admission.closed or answer.drain
        self._short_answers = self._short_answers + 1 if self.short else 0
        if self._config.policy.sharing:
            self._denied = asked > 0 and answer.granted == 0
        foreseen = GROWTH_ROUNDS * self._steps
        self._growth = max(LEAST_GROWTH, min(MOST_GROWTH, (self._growth + foreseen) // 2))
        self._steps = 0
        self._admission.keep = answer.keep
        self._admission.begin.update(answer.begin)
        self._moves.apply(answer)
        if answer.give_way:
            self._give_way(answer.give_way, answer.give_way_at)

    def put_aside(self) -> None:
        """The run is over: what runs is freed, and keeps its tokens."""
        for sequence in reversed(self.running):
            self._set_back(sequence)
        for sequence in self.waiting:
            self.swaps.discard(sequence)
        self.waiting = sorted((*self.running, *self.waiting), key=lambda s: s.id)
        self.running = []

    def _give_way(self, blocks: int, at: int) -> None:
        """Preempt sequences younger than the one that is starved, the youngest first, until
        `blocks` are free, at instance `at` if it is given."""
        before = self._admission.before
        kept = self._rm.prefixes.used_by(s.id for s in self.running if s.id <= before)
        for sequence in [s for s in reversed(self.running) if s.id > before]:
            if blocks <= 0:
                return
            parts = [part for part in self._rm.parts(sequence.id).values() if part not in kept]
            if at < 0 or any(at in part.remote for part in parts):
                blocks -= self._rm.held_alone(sequence.id, None if at < 0 else at)
                self._preempt(sequence)

    def demand(self) -> Demand:
        """Foreseen need against what there is. Credit that is not needed is given back."""
        if self._migrations:
            self._migrations.return_credit()
        self._outlook = self._admission.outlook(self.waiting, self.running)
        credit = self._usable_credit()
        if self._config.policy.lending and credit < self._rm.credit:
            self._moves.forget_plans()
            self._return_credit(self._rm.credit - credit)
        held = self._rm.usable + (credit if self._config.policy.lending else 0)
        if self._starved and self.running:
            oldest = self.running[0]
            growth = max(self._growth, oldest.length // STARVED_GROWTH)
            missing = self.foresight.missing(oldest, oldest.length + growth)
            largest = self._config.blocks(oldest.final_len)
            return Demand(max(1, missing - held), oldest.id, largest, True, 0)
        following = self._next_to_begin()
        need = self._admission.reserve if self.running else 0
        wanted, wanted_for, largest = 0, NOBODY, 0
        for sequence in (*self.running, *following):
            need += self.foresight.missing(sequence, self._foreseen(sequence))
            if need > held and self._worth_borrowing(sequence):
                wanted, wanted_for = need - held, min(wanted_for, sequence.id)
                largest = max(largest, self._config.blocks(sequence.final_len))
        if wanted:
            return Demand(wanted, wanted_for, largest, False, 0)
        if self._config.policy.lending:
            shed = self._moves.sheddable() if self._movable() else {}
            lacking = max(0, need - self._rm.usable)
            self._return_credit(self._rm.credit - lacking - sum(shed.values()), shed)
        if not self._config.policy.sharing:
            return Demand(0, NOBODY, 0, False, 0)
        rest = max(0, self._rm.usable + self._rm.credit - need)
        return Demand(0, NOBODY, 0, False, min(rest, self._lendable()))

    @property
    def fresh(self) -> int:
        """Waiting sequences that were not begun and could begin here."""
        aside = self._rm.host_space.aside
        waiting = [s for s in self.waiting if s.fresh and s.id not in aside]
        return sum(not self._admission.large(s) for s in waiting)

    @property
    def large(self) -> list[Large]:
        """Sequences too large for this instance: all that run, and the oldest that waits."""
        if not self._config.policy.planner:
            return []
        large, awaited = self._admission.large, self._rm.prefixes.awaited
        waiting = (s for s in self.waiting if large(s) and not awaited(s.keys))
        counted: set[int] = set()
        rows = (*filter(large, self.running), *islice(waiting, 1))
        return [self._large(sequence, counted) for sequence in rows]

    @property
    def lacking(self) -> int:
        """rBlocks that the oldest waiting sequence lacks to begin beside those that run."""
        return self._outlook.lacking if self.running else 0

    @property
    def longest(self) -> int:
        """Sealed rBlocks at home of the running sequence, or the prefix, that has most of them."""
        return max(self._moves.sealed(self.running).values(), default=0)

    def room(self) -> tuple[int, int]:
        """Rows and prompt tokens that may be assigned: enough to keep the batch full until the
        next rounds, no more, so that rows stay free to go where there is time."""
        room = self._rm.usable - self._admission.keep
        if room < self._admission.first_chunk and (
            self.waiting or not self.running or self._admission.keep
        ):
            return 0, 0
        most = self._config.max_num_batched_tokens
        queued = sum(
            min(self.foresight.uncomputed(s), most)
            for s in self.waiting
            if not self._admission.large(s)
        )
        rows = self._config.max_num_seqs - len(self.running) - len(self.waiting)
        return max(0, rows), max(0, 2 * most - queued)

    # -- a step ---------------------------------------------------------------------------------

    def plan(self, ahead: bool = False) -> Plan:
        """The next step: decodes first, then prefill chunks up to the token budget. `ahead`: while
        another one is computed, so nothing moves, and nobody gives way."""
        self._ahead = ahead
        self._short_steps = self._short_steps + 1 if self.short else 0
        self._starved = self.short = False
        self._steps += 1
        rows: dict[int, Row] = {}
        self._plan_decodes(rows)
        budget = self._config.max_num_batched_tokens
        if self._rm.guests:
            budget = min(budget, len(rows) + max(1, int(GUEST_STEPS * self.step_tokens)))
        self._plan_prefills(rows, budget - len(rows))
        copies, leaving = self._plan_migrations()
        for sequence in leaving:
            rows.pop(sequence.id, None)
        moves, recalls = ([], []) if ahead else self._plan_moves()
        self._idle = not rows and not ahead
        planned = [rows[request] for request in sorted(rows)]
        return Plan(planned, copies + moves, recalls, leaving, *self.swaps.take_plan())

    def commit(self) -> None:
        """The step's moves have arrived."""
        for sequence in self.swaps.commit():
            sequence.computed = 0
            self.add(sequence)

    def _plan_migrations(self) -> tuple[list[Move], list[Sequence]]:
        if not self._migrations:
            return [], []
        need = self._admission.reserve
        for sequence in (*self.running, *self._next_waiting()):
            need += self.foresight.missing(sequence, sequence.length + self._growth)
        return self._migrations.plan(self.running, need - self._rm.usable)

    def _plan_decodes(self, rows: dict[int, Row]) -> None:
        tables, size = self._rm.tables, self._config.block_size
        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.computed >= sequence.final_len:  # Its last token is on its way.
                continue
            table = tables.get(sequence.id)
            if table is None or self.swaps.leaves(sequence):  # An older one made it give way.
                continue
            if sequence.computed < table.blocks * size or self._make_room(sequence, 1, rows):
                rows[sequence.id] = Row(sequence, 1)

    def _plan_prefills(self, rows: dict[int, Row], budget: int) -> None:
        prefills = [s for s in self.running if s.remaining > 1]
        while budget > 0:
            sequence = prefills.pop(0) if prefills else self._admit()
            if sequence is None:
                return
            if not self._runs(sequence):
                continue
            tokens = min(sequence.remaining, budget, self._fit(sequence))
            if tokens and self._make_room(sequence, tokens, rows):
                rows[sequence.id] = Row(sequence, tokens)
                budget -= tokens
            elif not prefills:
                return

    def _runs(self, sequence: Sequence) -> bool:
        """Whether a sequence that ran when the step began has not given way since."""
        return sequence.id in self._rm.tables and not self.swaps.leaves(sequence)

    def _admit(self) -> Sequence | None:
        sequence = self._admission.next(self.waiting, self.running)
        if sequence is not None and self._ahead and sequence.id in self._rm.host_space.aside:
            return None  # what it has put aside would move
        if sequence is not None:
            # A victim of another's starved row may be older than what runs here by now.
            self.waiting.remove(sequence)
            self._admission.begin.discard(sequence.id)
            bisect.insort(self.running, sequence, key=lambda s: s.id)
            if self._begin(sequence):
                return self._admit()
        return sequence

    def _begin(self, sequence: Sequence) -> bool:
        """Give the sequence its block table. Returns whether it waits for what it has in the host's
        memory until the next step."""
        sits_out = False
        if sequence.id in self._rm.host_space.aside:
            sits_out = self.swaps.resume(sequence)
        else:
            self._rm.open(sequence.id, sequence.keys)
        size, prefix = self._config.block_size, self._rm.prefixes.last(sequence.id)
        sequence.computed = self._rm.tables[sequence.id].blocks * size
        self.cached_tokens += prefix.blocks * size if prefix else 0
        return sits_out

    def _foreseen(self, sequence: Sequence) -> int:
        """Tokens for which memory is asked for now."""
        return sequence.length + self._growth

    def _large(self, sequence: Sequence, counted: set[int]) -> Large:
        """`counted`: prefixes of others, which count once."""
        table, end = self._rm.tables.get(sequence.id), self.foresight.expected_end(sequence)
        shared = [p for p in self._rm.prefixes.chain(sequence.id) if p.id not in counted]
        counted.update(prefix.id for prefix in shared)
        held = sum(part.held for part in (*shared, table) if part)
        done = sequence.length - self.foresight.uncomputed(sequence)
        left = work(done, sequence.length, self._config.attention_tokens)
        return Large(
            sequence.id,
            begun=bool(table) or sequence.id in self._admission.begin,
            held=held,
            blocks=held + self.foresight.missing(sequence, int(end)),
            prompt=left if sequence.length > done + 1 else 0.0,
            output=end - sequence.length,
        )

    def _fit(self, sequence: Sequence) -> int:
        """Tokens the sequence can compute with what is free now. One too large for this instance
        leaves others what they grow by, as long as these go on: when they lack it, it is usually
        the youngest, and would be computed again. Any other can compute one at least."""
        held = self._rm.tables[sequence.id].blocks
        others = [s for s in self.running if s is not sequence]
        left = self._admission.reserve if others else 0
        yields = not self._idle and self._admission.large(sequence)
        if yields:
            left += sum(self.foresight.missing(s, self._foreseen(s)) for s in others)
        spare = max(0, self._rm.usable - left)
        return max(0 if yields else 1, (held + spare) * self._config.block_size - sequence.computed)

    def _make_room(self, sequence: Sequence, count: int, rows: dict[int, Row]) -> bool:
        """Give the sequence the rBlocks for `count` tokens, preempting younger ones if need be."""
        needed = self.foresight.missing(sequence, sequence.computed + count)
        if not needed:
            return True
        while needed > self._rm.usable:
            self.short = True
            if self._ahead:
                return False
            youngest = self.running[-1]
            if self._hopes(sequence) or self._waits_for_ends(youngest):
                self.stalls += 1
                return False
            if needed <= self.swaps.freeing or self.swaps.returns(youngest):
                self.stalls += 1
                return False
            if youngest is sequence:
                self.stalls += 1
                self._starved |= self._starves(sequence)
                return False
            self._preempt(youngest)
            rows.pop(youngest.id, None)
        self._rm.grow(sequence.id, needed)
        return True

    def _starves(self, sequence: Sequence) -> bool:
        """Whether a sequence that lacks memory needs rows elsewhere to give way: none can here."""
        oldest = sequence is self.running[0]
        return oldest and self._config.policy.lending and not self.swaps.helps(sequence)

    def _waits_for_ends(self, youngest: Sequence) -> bool:
        """Whether to let others end rather than `youngest` give way: for as long as it would take
        to compute its tokens again, or to copy them away and back, if anything goes on
        meanwhile."""
        waited = (self._short_steps + 1) * self.step_tokens
        return not self._idle and waited <= self.swaps.cost(youngest)

    def _hopes(self, sequence: Sequence) -> bool:
        """Whether rBlocks will come without anybody giving way."""
        if self._migrations and self._migrations.active:
            return True
        if self._config.policy.lending and self._rm.credit and self._movable():
            return True
        hope = not self._denied and self._short_answers < PATIENCE
        return hope and self._worth_borrowing(sequence)

    def _worth_borrowing(self, sequence: Sequence) -> bool:
        """Whether a sequence that lacks memory had better get it elsewhere. It must if it does not
        fit here or runs alone. Otherwise, with a planner, a waiting one waits, and a running one
        lets the youngest give way if that costs less: to compute its tokens again once, against an
        exchange in every step that is left."""
        if not self._config.policy.planner or not self.running or self.running == [sequence]:
            return True
        if self._admission.large(sequence):
            return True
        youngest = self.running[-1]
        if sequence.id not in self._rm.tables or sequence is youngest:
            return False
        left = sequence.final_len - sequence.length
        return self.swaps.cost(youngest) > self.exchange_tokens * left

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.preemptions += 1
        if not self.swaps.put_aside(sequence):
            self._set_back(sequence)
            self.add(sequence)

    def _set_back(self, sequence: Sequence) -> None:
        self._rm.close(sequence.id)
        sequence.computed = 0

    # -- foresight ------------------------------------------------------------------------------

    def _next_waiting(self) -> list[Sequence]:
        """The sequence that is next to be admitted, if any may be."""
        if self._admission.closed or len(self.running) >= self._config.max_num_seqs:
            return []
        following = self._admission.following(self.waiting)
        return [following] if following else []

    def _next_to_begin(self) -> list[Sequence]:
        """The same. With a planner, one that has to wait until others end takes nothing now."""
        waits = self._outlook.blocked if self._config.policy.planner else None
        return [sequence for sequence in self._next_waiting() if sequence is not waits]

    def _lendable(self) -> int:
        """Room that nobody here needs: not what runs, nor what begins next, nor what new rows begin
        with. While an older request is starved elsewhere, only what is older counts; and what was
        to be kept for loans is not for those that wait."""
        before, keep = self._admission.before, self._admission.keep
        need = 0 if keep or before < NOBODY else self._admission.first_chunk
        claims = self.foresight.claims([s for s in self.running if s.id <= before])
        if not keep:
            claims += self._outlook.claims
        growth = self.foresight.peak(claims) - self.foresight.at_home(self.running)
        return max(0, int(self._rm.usable - need - max(0, growth)))

    def _usable_credit(self) -> int:
        """Credit that can help: through it flows what is sealed at home, so without room or sealed
        rBlocks at home it is worth nothing."""
        return self._rm.credit if self._rm.usable > 0 or self._movable() else 0

    def _movable(self) -> bool:
        return any(self._moves.sealed(self.running).values())

    def _return_credit(self, surplus: int, planned: Mapping[int, int] = NOTHING_PLANNED) -> None:
        """Give back `surplus` of the credit, but not what is `planned` to be used (by creditor)."""
        for creditor, debt in list(self._rm.debts.items()):
            blocks = max(0, min(debt.credit - planned.get(creditor, 0), surplus))
            self._rm.return_credit(creditor, blocks)
            surplus -= blocks

    def _plan_moves(self) -> tuple[list[Move], list[Move]]:
        """Moves out, at least those that free what the next two steps need, and moves home; what
        creditors do not take of that goes to the host's memory."""
        lending = self._config.policy.lending and self._rm.debts
        if not lending and not self._config.host_blocks:
            return [], []
        ahead = 2 * self._config.max_num_batched_tokens

        def growth(sequence: Sequence) -> int:
            target = min(sequence.length + GROWTH_TOKENS, sequence.computed + ahead)
            return self.foresight.missing(sequence, target)

        short = self._admission.reserve - self._rm.usable + sum(map(growth, self.running))
        most = 2 * self._config.blocks(ahead)
        moves: tuple[list[Move], list[Move]] = [], []
        if lending:
            beginning = sum(map(growth, self._next_to_begin()))
            waited = min(short + beginning, most)
            moves = self._moves.plan(self.running, waited, self._home_growth)
        if self._config.host_blocks:
            self.swaps.plan(self.running, min(short, most) - len(moves[0]))
        return moves

    def _home_growth(self) -> int:
        """rBlocks that what runs comes to take here beyond those it has."""
        peak = self.foresight.peak(self.foresight.claims(self.running))
        return max(0, math.ceil(peak) - self.foresight.at_home(self.running))
