"""Which rows run in a step, what is preempted when memory is short, and what moves out."""

from __future__ import annotations

import bisect
import math

from hpc_distkv.control.assign.work import STEP_TOKENS
from hpc_distkv.control.messages.answer import Answer
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.decide.admission import Admission
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.demand import Demand, Demands
from hpc_distkv.decide.foresight import Foresight
from hpc_distkv.decide.migration import Migrations
from hpc_distkv.decide.moves import Moves
from hpc_distkv.decide.plan import Plan, Scheduled
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.swap import GROWTH_TOKENS, Swaps
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager

GUEST_STEPS = 5
"""How many times its fixed time a step may compute prompts while guests are hosted: they wait for
its operators, and shorter steps waste time of their own."""
PATIENCE = 2
"""Answers after which a sequence that lacks memory no longer waits for a grant."""


class Scheduler:
    """Continuous batching with chunked prefill, oldest first. Owner of the waiting and running
    sequences; every rBlock it hands out it takes from its RManager. Pure.

    Both lists ascend by age. When a sequence lacks an rBlock it first waits for credit it may hope
    for, then for others to end, then preempts the youngest running sequence, and if it is
    itself the youngest it stalls. The oldest one stalled at home without hope is reported as
    starved; the gManager then makes room elsewhere. Hope is bounded: it ends with a denial, or when
    a shortage has outlasted `PATIENCE` answers; so is the wait for others, by what it costs to let
    preempt the youngest.
    """

    def __init__(self, rmanager: RManager, config: EngineConfig, counters: Counters) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.counters = counters
        self.step_tokens = STEP_TOKENS
        """Prompt tokens computed in the fixed time of a step."""
        self._rm = rmanager
        self._config = config
        self.foresight = Foresight(rmanager, config)
        self._admission = Admission(rmanager, config, self.foresight)
        self._starved = False
        self.short = False
        """Whether memory was short in the last step that was planned."""
        self._ahead = self._held_back = False
        """Whether another step is computed meanwhile; whether for that somebody did not go on."""
        self._short_answers = self._short_steps = 0
        """Answers and steps for which memory has been short."""
        self._idle = True
        """Whether nothing ran in the last step."""
        self._migrations = Migrations(rmanager, config) if config.policy.migrate else None
        self._steps = 0
        self._moves = Moves(rmanager, config)
        self.swaps = Swaps(rmanager, config, self.foresight)
        self.demands = Demands(
            rmanager,
            config,
            self._admission,
            self._moves,
            self.swaps,
            self.foresight,
            self.waiting,
            self.running,
        )
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
        fresh = self._fresh()
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
        self.demands.grown(self._steps)
        self._steps = 0
        self._admission.keep = answer.keep
        self._admission.begin.update({s.id for s in self.waiting}.intersection(answer.begin))
        self._moves.apply(answer)
        if answer.preempt:
            self._preempt_younger(answer.preempt, answer.preempt_at)

    @property
    def moving(self) -> bool:
        """Whether the next step may have moves."""
        return self._moves.coming or self._held_back

    def stop(self) -> None:
        """The run is over: what runs is freed, and keeps its tokens."""
        for sequence in reversed(self.running):
            self._set_back(sequence)
        for sequence in self.waiting:
            self.swaps.discard(sequence)
        self.waiting[:] = sorted((*self.running, *self.waiting), key=lambda s: s.id)
        self.running.clear()

    def _preempt_younger(self, blocks: int, at: int) -> None:
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
        """What it asks of others, and what it offers them. Credit that is not needed is given
        back."""
        if self._migrations:
            self._migrations.return_credit()
        return self.demands.weigh(self._starved)

    @property
    def fresh(self) -> int:
        """Waiting sequences that were not begun, and may go elsewhere."""
        return len(self._fresh())

    def _fresh(self) -> list[Sequence]:
        return [s for s in self.waiting if s.fresh and not self._stays(s)]

    def _stays(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence has something here: what was swapped out of it, word that it
        may begin, or, of one too large for an instance, a beginning."""
        number, prefixes = sequence.id, self._rm.prefixes
        if number in self._rm.swap.swapped or number in self._admission.begin:
            return True
        return self._admission.large(sequence) and prefixes.coming(sequence.keys) > 0

    def room(self) -> tuple[int, int]:
        """Rows and prompt tokens that may be assigned: enough to keep the batch full until the
        next rounds, no more, so that rows stay free to go where there is time."""
        room = self._rm.usable - self._admission.keep
        if room < self._admission.first_chunk and (
            self.waiting or not self.running or self._admission.keep
        ):
            return 0, 0
        most = self._config.max_num_batched_tokens
        queued = sum(min(self.foresight.uncomputed(s), most) for s in self.waiting)
        rows = self._config.max_num_seqs - len(self.running) - len(self.waiting)
        return max(0, rows), max(0, 2 * most - queued)

    # -- a step ---------------------------------------------------------------------------------

    def plan(self, ahead: bool = False) -> Plan:
        """The next step: decodes first, then prefill chunks up to the token budget. `ahead`: while
        another one is computed, so nothing moves, and nobody is preempted."""
        self._ahead, self._held_back = ahead, False
        self._short_steps = self._short_steps + 1 if self.short else 0
        self._starved = self.short = False
        self._steps += 1
        rows: dict[int, Scheduled[Sequence]] = {}
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
        for sequence in (*self.running, *self.demands.next_waiting()):
            need += self.foresight.missing(sequence, self.demands.foreseen(sequence))
        return self._migrations.plan(self.running, need - self._rm.usable)

    def _plan_decodes(self, rows: dict[int, Scheduled[Sequence]]) -> None:
        tables, size = self._rm.tables, self._config.block_size
        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.computed >= sequence.final_len:  # Its last token is on its way.
                continue
            if self._runs(sequence) and (
                sequence.computed < tables[sequence.id].blocks * size
                or self._make_room(sequence, 1, rows)
            ):
                rows[sequence.id] = Scheduled(sequence, 1)

    def _plan_prefills(self, rows: dict[int, Scheduled[Sequence]], budget: int) -> None:
        prefills = [s for s in self.running if s.remaining > 1]
        while budget > 0:
            sequence = prefills.pop(0) if prefills else self._admit()
            if sequence is None:
                return
            if not self._runs(sequence):
                continue
            tokens = min(sequence.remaining, budget, self._fit(sequence))
            if tokens and self._make_room(sequence, tokens, rows):
                rows[sequence.id] = Scheduled(sequence, tokens)
                budget -= tokens
            elif not prefills:
                return

    def _runs(self, sequence: Sequence) -> bool:
        """Whether a sequence that ran when the step began has not been preempted since."""
        return sequence.id in self._rm.tables and not self.swaps.leaves(sequence)

    def _admit(self) -> Sequence | None:
        """The next waiting sequence that begins, or goes on, in this step."""
        while sequence := self._admission.next(self.waiting, self.running):
            if self._ahead and sequence.id in self._rm.swap.swapped:
                self._held_back = True  # what was swapped out would move
                return None
            # A victim of another's starved row may be older than what runs here by now.
            self.waiting.remove(sequence)
            self._admission.begin.discard(sequence.id)
            self.adopt(sequence)
            if not self._begin(sequence):
                return sequence
        return None

    def _begin(self, sequence: Sequence) -> bool:
        """Give the sequence its block table. Returns whether it waits for what it has in the host's
        memory until the next step."""
        sits_out = False
        if sequence.id in self._rm.swap.swapped:
            sits_out = self.swaps.resume(sequence)
        else:
            self._rm.open(sequence.id, sequence.keys)
        size, prefix = self._config.block_size, self._rm.prefixes.last(sequence.id)
        sequence.computed = self._rm.tables[sequence.id].blocks * size
        self.counters.cached_tokens += prefix.blocks * size if prefix else 0
        return sits_out

    def _fit(self, sequence: Sequence) -> int:
        """Tokens the sequence can compute with what is free now. One too large for this instance
        leaves those that decode, or are older, what they grow by, as long as these go on: when
        they lack it, it is usually the youngest, and would be computed again. Any other can compute
        one at least."""
        held = self._rm.tables[sequence.id].blocks
        left = self._admission.reserve if len(self.running) > 1 else 0
        yields = not self._idle and self._admission.large(sequence)
        if yields:
            left += sum(
                self.foresight.missing(s, self.demands.foreseen(s))
                for s in self.running
                if s is not sequence and (s.remaining == 1 or s.id < sequence.id)
            )
        spare = max(0, self._rm.usable - left)
        return max(0 if yields else 1, (held + spare) * self._config.block_size - sequence.computed)

    def _make_room(
        self, sequence: Sequence, count: int, rows: dict[int, Scheduled[Sequence]]
    ) -> bool:
        """Give the sequence the rBlocks for `count` tokens, preempting younger ones if need be."""
        needed = self.foresight.missing(sequence, sequence.computed + count)
        if not needed:
            return True
        while needed > self._rm.usable:
            self.short = True
            if self._ahead:
                return False
            youngest = self.running[-1]
            if (
                self._hopes(sequence)
                or self._waits_for_ends(youngest)
                or needed <= self.swaps.freeing
                or self.swaps.returns(youngest)
            ):
                self.counters.stalls += 1
                return False
            if youngest is sequence:
                self.counters.stalls += 1
                self._starved |= self._starves(sequence)
                return False
            self._preempt(youngest)
            rows.pop(youngest.id, None)
        self._rm.grow(sequence.id, needed)
        return True

    def _starves(self, sequence: Sequence) -> bool:
        """Whether a sequence that lacks memory needs rows elsewhere preempted: none can be here."""
        oldest = sequence is self.running[0]
        return oldest and self._config.policy.lending and not self.swaps.helps(sequence)

    def _waits_for_ends(self, youngest: Sequence) -> bool:
        """Whether to let others end rather than preempt `youngest`: for as long as it would take
        to compute its tokens again, or to copy them away and back, if anything goes on
        meanwhile."""
        waited = (self._short_steps + 1) * self.step_tokens
        return not self._idle and waited <= self.swaps.cost(youngest)

    def _hopes(self, sequence: Sequence) -> bool:
        """Whether rBlocks will come without a preemption."""
        if self._migrations and self._migrations.active:
            return True
        if self._config.policy.lending and self._rm.credit and self.demands.movable():
            return True
        return self._may_borrow(sequence)

    def _may_borrow(self, sequence: Sequence) -> bool:
        """Whether credit may yet come for a sequence that lacks memory."""
        hope = not self._denied and self._short_answers < PATIENCE
        return hope and self.demands.worth_borrowing(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.counters.preemptions += 1
        if not self.swaps.swap_out(sequence):
            self._set_back(sequence)
            self.add(sequence)

    def _set_back(self, sequence: Sequence) -> None:
        self._rm.close(sequence.id)
        sequence.computed = 0

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
            beginning = sum(map(growth, self.demands.next_to_begin()))
            waited = min(short + beginning, most)
            moves = self._moves.plan(self.running, waited, self._home_growth)
        if self._config.host_blocks:
            self.swaps.plan(self.running, min(short, most) - len(moves[0]), self._may_borrow)
        return moves

    def _home_growth(self) -> int:
        """rBlocks that what runs comes to take here beyond those it has."""
        peak = self.foresight.peak(self.foresight.claims(self.running))
        return max(0, math.ceil(peak) - self.foresight.at_home(self.running))
