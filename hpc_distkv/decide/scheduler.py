"""Which sequences run in a step, which are preempted when memory is short, and what moves."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.decide.admission import Admission, next_waiting, outlook
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.demand import Demand, growth_of, next_admitted, weigh, worth_borrowing
from hpc_distkv.decide.foresight import Foresight
from hpc_distkv.decide.migration import Migrations
from hpc_distkv.decide.moves import Moves
from hpc_distkv.decide.pace import Calibration
from hpc_distkv.decide.plan import Plan, Scheduled
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.state import NOTHING_WAITS, Orders, sealed, too_large
from hpc_distkv.decide.swap import GROWTH_TOKENS, Swaps, may_spill, preemption_cost
from hpc_distkv.ids import InstanceId, RequestId
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.rmanager import RManager

GUEST_STEPS = 5
"""How many times its fixed time a step may compute prompts while guests are hosted: they wait for
its operators, and shorter steps waste time of their own."""
PATIENCE = 2
"""Answers after which a sequence that lacks memory no longer waits for a grant."""
GROWTH_ROUNDS = 3
"""Control rounds in which sequences grow before rBlocks that are asked for now can be used."""
LEAST_GROWTH, MOST_GROWTH = 16, 256
"""Bounds of the decode tokens per sequence that are expected when memory is asked for."""


class Scheduler:
    """Continuous batching with chunked prefill, oldest first. Owner of the waiting and running
    sequences and of all that decisions are made on (`State`): admission, demand, moves, migration
    and swapping read it and return decisions, which the scheduler carries out; moves, migration and
    swapping also begin the transfers of rBlocks that they choose, at the RManager. Every rBlock
    comes from there.

    Both lists ascend by age. When a sequence lacks an rBlock it waits first for credit that may
    come, then for others to end; then the youngest running sequence is preempted, and if it is
    itself the youngest it stalls. The oldest one that stalls at home, with no credit to come, is
    reported as starved; the gManager then makes room elsewhere. Why no wait is endless:
    `docs/design.md`.
    """

    def __init__(self, rm: RManager, config: EngineConfig, counters: Counters) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.rm, self.config, self.counters = rm, config, counters
        self.foresight = Foresight(rm, config)
        self.orders, self.calibration, self.outlook = Orders(), Calibration(), NOTHING_WAITS
        self.growth = MOST_GROWTH // 4
        self.short = False
        """Whether memory was short in the last step that was planned."""
        self._short_answers = self._short_steps = 0
        """Answers and steps for which memory has been short."""
        self._denied = not config.policy.sharing
        """Whether the last answer granted nothing of what was asked for."""
        self._starved = False
        self._ahead = False
        """True if the step is planned ahead (`look_ahead`)."""
        self._held_back = False
        """True if a swapped-out sequence was not resumed, because the step was planned ahead."""
        self._idle = True
        """Whether nothing ran in the last step."""
        self._steps = 0
        """Planned since the last answer."""
        self._admission = Admission()
        self._moves = Moves()
        self._swaps = Swaps()
        self._migrations = Migrations() if config.policy.migrate else None

    # -- between steps --------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A sequence to admit when there is room."""
        sequence.keys = sequence.keys or self.config.prefix_keys(sequence.request)
        bisect.insort(self.waiting, sequence, key=lambda s: s.id)

    def finish(self, sequence: Sequence, in_use: bool = False) -> None:
        """The sequence has all its output; its rBlocks go back, also to its creditors. If they are
        `in_use`, they are to be closed later."""
        self.running.remove(sequence)
        if not in_use:
            self.rm.close(sequence.id)
        self.foresight.outputs.add(sequence.output_len, sequence.request.sampling.max_tokens)

    def adopt(self, sequence: Sequence) -> None:
        """A running sequence that another instance handed over, with its rBlocks."""
        self._start(sequence)

    def hand_over(self, sequence: Sequence) -> None:
        """The sequence runs elsewhere from now on."""
        self.running.remove(sequence)
        self.rm.hand_over(sequence.id)

    def give_back(self, most: int) -> list[Sequence]:
        """The youngest waiting sequences that were not begun, `most` of them: they go elsewhere."""
        fresh = self._fresh()
        given = fresh[max(0, len(fresh) - most) :]
        for sequence in given:
            self.waiting.remove(sequence)
        return given

    def apply(self, answer: Answer, asked: int) -> None:
        """The answer to a report that asked for `asked` rBlocks."""
        begin = self.orders.begin | {s.id for s in self.waiting}.intersection(answer.begin)
        closed = self.orders.closed or answer.drain
        self.orders = Orders(answer.admit_before, closed, answer.keep, begin)
        self._short_answers = self._short_answers + 1 if self.short else 0
        if self.config.policy.sharing:
            self._denied = asked > 0 and answer.granted == 0
        growth = (self.growth + GROWTH_ROUNDS * self._steps) // 2
        self.growth, self._steps = max(LEAST_GROWTH, min(MOST_GROWTH, growth)), 0
        self._moves.apply(answer)
        if answer.preempt:
            self._preempt_younger(answer.preempt, answer.preempt_at)

    def calibrate(self, calibration: Calibration) -> None:
        """What steps have shown of costs."""
        self.calibration = calibration

    @property
    def moving(self) -> bool:
        """True if the next step may have moves."""
        return self._moves.coming(self.rm) or self._held_back

    def stop(self) -> None:
        """The run is over: all rBlocks are freed; all sequences wait, and keep their tokens."""
        for sequence in reversed(self.running):
            self._set_back(sequence)
        for sequence in self.waiting:
            self.rm.swap.discard(sequence.id)
        self.waiting = sorted((*self.running, *self.waiting), key=lambda s: s.id)
        self.running = []

    def _preempt_younger(self, blocks: int, at: InstanceId | None) -> None:
        """Preempt sequences younger than the one that is starved, the youngest first, until
        `blocks` are free, at instance `at` only if given."""
        before = self.orders.before
        kept = self.rm.prefixes.used_by(s.id for s in self.running if s.id <= before)
        for sequence in [s for s in reversed(self.running) if s.id > before]:
            if blocks <= 0:
                return
            parts = [part for part in self.rm.parts(sequence.id).values() if part not in kept]
            if at is None or any(at in part.remote for part in parts):
                blocks -= self.rm.held_alone(sequence.id, at)
                self._preempt(sequence)

    def demand(self) -> Demand:
        """What it asks of others, and what it offers them. Credit that is not needed is given
        back."""
        rm = self.rm
        if self._migrations:
            self._return_credit(self._migrations.surplus(rm))
        self.outlook = outlook(self)
        if self.config.policy.lending and rm.borrower.credit and not self._credit_helps():
            self._moves.forget_plans()
            self._return_credit(
                {creditor: debt.credit for creditor, debt in rm.borrower.debts.items()}
            )
        weighed = weigh(self, self._starved, self._moves.sheddable(rm))
        self._return_credit(weighed.surplus)
        return weighed

    def _credit_helps(self) -> bool:
        """Credit is worth nothing without room or sealed rBlocks at home: those would use it."""
        return self.rm.slots.usable > 0 or any(sealed(self).values())

    def _return_credit(self, surplus: Mapping[InstanceId, int]) -> None:
        for creditor, blocks in surplus.items():
            self.rm.borrower.return_credit(creditor, blocks)

    @property
    def fresh(self) -> int:
        """Waiting sequences that were not begun, and may go elsewhere."""
        return len(self._fresh())

    def _fresh(self) -> list[Sequence]:
        return [s for s in self.waiting if s.fresh and not self._stays(s)]

    def _stays(self, sequence: Sequence) -> bool:
        """True if a waiting sequence has something here: swapped-out KV, the order to begin, or, if
        it is too large for an instance, a prefix."""
        number, prefixes = sequence.id, self.rm.prefixes
        if number in self.rm.swap.swapped or number in self.orders.begin:
            return True
        return too_large(self, sequence) and prefixes.coming(sequence.keys) > 0

    def room(self) -> tuple[int, int]:
        """Requests and prompt tokens that may be assigned: enough to keep the batch full until the
        next rounds, no more, so that requests stay free to go where there is time."""
        keep = self.orders.keep
        if self.rm.slots.usable - keep < self.config.first_chunk and (
            self.waiting or not self.running or keep
        ):
            return 0, 0
        most = self.config.max_num_batched_tokens
        queued = sum(min(self.foresight.uncomputed(s), most) for s in self.waiting)
        seats = self.config.max_num_seqs - len(self.running) - len(self.waiting)
        return max(0, seats), max(0, 2 * most - queued)

    # -- a step ---------------------------------------------------------------------------------

    def plan(self, ahead: bool = False) -> Plan:
        """The next step: decodes first, then prefill chunks up to the token budget. `ahead`: while
        the device computes another one (`look_ahead`)."""
        self._ahead, self._held_back = ahead, False
        self._short_steps = self._short_steps + 1 if self.short else 0
        self._starved = self.short = False
        self._steps += 1
        planned: dict[RequestId, Scheduled[Sequence]] = {}
        self._plan_decodes(planned)
        budget = self.config.max_num_batched_tokens
        if self.rm.lender.guests:
            guest_budget = int(GUEST_STEPS * self.calibration.step_tokens)
            budget = min(budget, len(planned) + max(1, guest_budget))
        self._plan_prefills(planned, budget - len(planned))
        copies, leaving = self._plan_migrations()
        for sequence in leaving:
            planned.pop(sequence.id, None)
        moves, recalls = ([], []) if ahead else self._plan_moves()
        self._idle = not planned and not ahead
        scheduled = [planned[request] for request in sorted(planned)]
        return Plan(scheduled, copies + moves, recalls, leaving, *self._swaps.take_plan())

    def commit(self) -> None:
        """The step's moves have arrived."""
        for sequence in self._swaps.commit():
            self.rm.finish_swap_out(sequence.id)
            sequence.computed = 0
            self.add(sequence)

    def _plan_decodes(self, planned: dict[RequestId, Scheduled[Sequence]]) -> None:
        tables, size = self.rm.tables, self.config.block_size
        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.computed >= sequence.final_len:  # Its last token is on its way.
                continue
            if self._runs(sequence) and (
                sequence.computed < tables[sequence.id].blocks * size
                or self._make_room(sequence, 1, planned)
            ):
                planned[sequence.id] = Scheduled(sequence, 1)

    def _plan_prefills(self, planned: dict[RequestId, Scheduled[Sequence]], budget: int) -> None:
        prefills = [s for s in self.running if s.remaining > 1]
        while budget > 0:
            sequence = prefills.pop(0) if prefills else self._admit()
            if sequence is None:
                return
            if not self._runs(sequence):
                continue
            tokens = min(sequence.remaining, budget, self._fit(sequence))
            if tokens and self._make_room(sequence, tokens, planned):
                planned[sequence.id] = Scheduled(sequence, tokens)
                budget -= tokens
            elif not prefills:
                return

    def _runs(self, sequence: Sequence) -> bool:
        """True if a sequence that ran when the step began was not preempted since."""
        return sequence.id in self.rm.tables and not self._swaps.leaves(sequence)

    def _admit(self) -> Sequence | None:
        """The next waiting sequence that begins, or goes on, in this step."""
        while sequence := self._admission.next(self):
            if self._ahead and sequence.id in self.rm.swap.swapped:
                self._held_back = True  # Its rBlocks would move.
                return None
            self.waiting.remove(sequence)
            if sequence.id in self.orders.begin:
                self.orders = self.orders._replace(begin=self.orders.begin - {sequence.id})
            self._start(sequence)
            if not self._begin(sequence):
                return sequence
        return None

    def _start(self, sequence: Sequence) -> None:
        """It runs. Preempted for one that starved elsewhere, it may be older than others that run
        by now."""
        bisect.insort(self.running, sequence, key=lambda s: s.id)

    def _begin(self, sequence: Sequence) -> bool:
        """Give the sequence its block table. Returns True if it waits for its rBlocks in the host's
        memory until the next step."""
        sits_out = False
        if sequence.id in self.rm.swap.swapped:
            sits_out = self._swaps.resume(self, sequence)
        else:
            self.rm.open(sequence.id, sequence.keys)
        size, prefix = self.config.block_size, self.rm.prefixes.last(sequence.id)
        sequence.computed = self.rm.tables[sequence.id].blocks * size
        self.counters.cached_tokens += prefix.blocks * size if prefix else 0
        return sits_out

    def _fit(self, sequence: Sequence) -> int:
        """Tokens the sequence can compute with what is free now: one at least. But a sequence too
        large for this instance takes nothing that older and decoding ones will need soon: it is
        usually the youngest, so it would be preempted and computed again."""
        held = self.rm.tables[sequence.id].blocks
        left = self.config.reserve if len(self.running) > 1 else 0
        yields = not self._idle and too_large(self, sequence)
        if yields:
            left += sum(
                growth_of(self, s)
                for s in self.running
                if s is not sequence and (s.remaining == 1 or s.id < sequence.id)
            )
        spare = max(0, self.rm.slots.usable - left)
        return max(0 if yields else 1, (held + spare) * self.config.block_size - sequence.computed)

    # -- when memory is short -------------------------------------------------------------------

    def _make_room(
        self, sequence: Sequence, count: int, planned: dict[RequestId, Scheduled[Sequence]]
    ) -> bool:
        """Give the sequence the rBlocks for `count` tokens, preempting younger ones if need be.
        Returns False if it stalls."""
        needed = self.foresight.missing(sequence, sequence.computed + count)
        while needed > self.rm.slots.usable:
            self.short = True
            youngest = self.running[-1]
            if self._ahead:
                return False
            waits = self._may_wait(sequence, needed, youngest)
            if waits or youngest is sequence:
                self.counters.stalls += 1
                self._starved |= not waits and self._starves(sequence)
                return False
            self._preempt(youngest)
            planned.pop(youngest.id, None)
        self.rm.grow(sequence.id, needed)
        return True

    def _may_wait(self, sequence: Sequence, needed: int, youngest: Sequence) -> bool:
        """True if the sequence, which lacks `needed` rBlocks, waits rather than have `youngest`
        preempted, for

        * credit, there or to come, or a request that migrates
        * others to end, for as long as a preemption would cost, if anything goes on meanwhile
        * rBlocks that are swapped out in this step
        * the youngest itself, which comes home from the host's memory in this step
        """
        waited = (self._short_steps + 1) * self.calibration.step_tokens
        return (
            self._expects_blocks(sequence)
            or (not self._idle and waited <= preemption_cost(self, youngest))
            or needed <= self._swaps.freeing
            or self._swaps.returns(youngest)
        )

    def _starves(self, sequence: Sequence) -> bool:
        """True if a sequence that lacks memory can go on only if others are preempted elsewhere."""
        oldest = sequence is self.running[0]
        return oldest and self.config.policy.lending and not may_spill(self, sequence)

    def _expects_blocks(self, sequence: Sequence) -> bool:
        """True if rBlocks will come without a preemption."""
        if self._migrations and self._migrations.active(self.rm):
            return True
        if self.config.policy.lending and self.rm.borrower.credit and any(sealed(self).values()):
            return True
        return self._may_borrow(sequence)

    def _may_borrow(self, sequence: Sequence) -> bool:
        """True if credit may yet come for a sequence that lacks memory."""
        awaited = not self._denied and self._short_answers < PATIENCE
        return awaited and worth_borrowing(self, sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.counters.preemptions += 1
        if not self._swaps.swap_out(self, sequence):
            self._set_back(sequence)
            self.add(sequence)

    def _set_back(self, sequence: Sequence) -> None:
        self.rm.close(sequence.id)
        sequence.computed = 0

    # -- moves ----------------------------------------------------------------------------------

    def _plan_migrations(self) -> tuple[list[Move], list[Sequence]]:
        if not self._migrations:
            return [], []
        growing = (*self.running, *next_waiting(self))
        need = self.config.reserve + sum(growth_of(self, s) for s in growing)
        return self._migrations.plan(self, need - self.rm.slots.usable)

    def _plan_moves(self) -> tuple[list[Move], list[Move]]:
        """Moves out, at least those that free what the next two steps need, and moves home; what
        creditors do not take of that goes to the host's memory."""
        lending = self.config.policy.lending and self.rm.borrower.debts
        if not lending and not self.config.host_blocks:
            return [], []
        ahead = 2 * self.config.max_num_batched_tokens

        def growth(sequence: Sequence) -> int:
            target = min(sequence.length + GROWTH_TOKENS, sequence.computed + ahead)
            return self.foresight.missing(sequence, target)

        short = self.config.reserve - self.rm.slots.usable + sum(map(growth, self.running))
        most = 2 * self.config.blocks(ahead)
        moves: tuple[list[Move], list[Move]] = [], []
        if lending:
            waited = short + sum(map(growth, next_admitted(self)))
            moves = self._moves.plan(self, min(waited, most), self._home_growth)
        if self.config.host_blocks:
            self._swaps.plan(self, min(short, most) - len(moves[0]), self._may_borrow)
        return moves

    def _home_growth(self) -> int:
        """rBlocks that the running sequences are expected to need here beyond those they have."""
        peak = self.foresight.peak(self.foresight.expected_kvs(self.running))
        return max(0, math.ceil(peak) - self.foresight.at_home(self.running))
