"""The loop of one rank."""

from __future__ import annotations

import logging
import time
from typing import Protocol

import msgspec
import torch

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages import Answer, Counters, Report, Result, pack_tokens
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.forward import Forward, Model
from hpc_distkv.engine.sampler import sample
from hpc_distkv.engine.scheduler import Row, Scheduler
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.engine.traffic import Traffic
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.rmanager import RManager

log = logging.getLogger(__name__)


class Leader(Protocol):
    """What rank 0 does beside its own work."""

    gmanager: GManager

    def finish(self, result: Result) -> None:
        """A request has its result."""

    def tick(self) -> None:
        """Called after every control round."""


def smoothed(average: float, value: float) -> float:
    """The moving average after one more value; the first value starts it."""
    return 0.7 * average + 0.3 * value if average else value


class Worker:
    """One rank at work: round boundaries, steps, results.

    Boundaries: a rank reports, goes on with the steps that the last answer announced, takes the
    answer to its report at its next boundary, applies it there, and reports again. Ranks that are
    partners count the same joint steps, so they apply answers that change their partnership at
    the same point of their common order. A rank without partners has nobody to agree with: its
    boundary is the first step that finds the answer there, so it never waits while it has work.

    Why no wait lasts for ever: partnership is symmetric and its members are told the same number
    of steps, since one answer of the gManager makes both sides and the ledger still counts what a
    creditor has set aside but not opened. A rank waits (1) in a step, for partners' messages of
    the same joint step, whose order within the step `Traffic` gives, and (2) at a boundary, for
    the answer, hence for every rank's report. Take the rank with the fewest boundaries behind it,
    and in its component the one with the fewest joint steps: its partners are not behind it, so it
    can step; and if it waits at a boundary, all ranks have passed that boundary's predecessor,
    have reported, and rank 0 can answer. Rank 0 answers between layers and during all its waits.
    That rows wait for memory, which is no wait for a message, is bounded by the scheduler's
    patience and the gManager's victims.
    """

    def __init__(
        self,
        comm: Comm,
        model: Model,
        pool: BlockPool,
        config: EngineConfig,
        shape: tuple[int, int],
        leader: Leader | None,
    ) -> None:
        """`shape`: query heads and head dimension. `leader`: on rank 0 only."""
        self.counters = Counters()
        self._comm, self._config, self._leader, self._pool = comm, config, leader, pool
        self._rm = RManager(comm.world.instance, config.num_blocks, config.lend_cap)
        self._scheduler = Scheduler(self._rm, config)
        scale = shape[1] ** -0.5
        self._forward = Forward(model, pool, self._rm, scale, self._attend_control)
        self._traffic = Traffic(comm, pool, self._rm, self.counters, shape, scale)
        self._round = 0
        self._answer: Answer | None = None
        self._partners: list[int] = []
        self._steps_left = 0
        self._joint_step = 0
        self._idle = True
        self._asked = 0
        self._step_time = self._chunk_time = 0.0
        self._results: list[Result] = []
        self._held: dict[int, dict[int, int]] = {}

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the gManager says stop. Raises StallError and ProtocolError."""
        background = self._comm.waiter.background
        background.append(self._attend_control)
        try:
            self._loop()
        finally:
            background.remove(self._attend_control)

    def _loop(self) -> None:
        self._report()
        while True:
            if self._at_boundary():
                answer = self._take_answer()
                if answer.stop:
                    return
                self._apply(answer)
                self._report()
            self._step()

    # -- control --------------------------------------------------------------------------------

    def _at_boundary(self) -> bool:
        if self._partners:
            return self._steps_left == 0
        return self._idle or self._poll_answer() is not None

    def _poll_answer(self) -> Answer | None:
        self._attend_control()
        return self._answer

    def _take_answer(self) -> Answer:
        started = time.perf_counter()
        answer = self._comm.idle(self._poll_answer, f"the answer of control round {self._round}")
        self.counters.control_wait += time.perf_counter() - started
        self._answer = None
        return answer

    def _attend_control(self) -> None:
        """Let control rounds progress: on rank 0 the gManager's part, everywhere one's own."""
        if self._leader and (messages := self._comm.rounds.reports()) is not None:
            reports = [msgspec.msgpack.decode(message, type=Report) for message in messages]
            answers, results = self._leader.gmanager.round(reports)
            self._comm.rounds.reply([msgspec.msgpack.encode(answer) for answer in answers])
            for result in results:
                self._leader.finish(result)
            self._leader.tick()
        if self._answer is None and (message := self._comm.rounds.answer()) is not None:
            self._answer = msgspec.msgpack.decode(message, type=Answer)

    def _apply(self, answer: Answer) -> None:
        now = time.monotonic()
        for debtor in self._rm.settle(answer.lend):
            self.counters.refused_grants += 1
            log.error("refused a grant to instance %d beyond the promise: %s", debtor, answer.lend)
        for request in answer.assign:
            self._scheduler.add(Sequence(request, assigned_at=now))
        for victim in answer.preempt:
            self._scheduler.give_way(victim)
        self._scheduler.answered(self._asked, answer.granted, answer.admit_before)
        self._partners, self._steps_left = answer.partners, answer.steps
        self._joint_step = 0
        self._round += 1

    def _report(self) -> None:
        demand = self._scheduler.demand()
        rows, tokens = self._scheduler.room()
        self._asked = demand.wanted
        held = self._places()
        changed = {r: p for r, p in held.items() if self._held.get(r) != p}
        changed |= {request: {} for request in self._held.keys() - held.keys()}
        self._held = held
        self.counters.preemptions = self._scheduler.preemptions
        report = Report(
            round=self._round,
            capacity=self._rm.num_blocks,
            free=self._rm.free,
            promised=self._rm.promise(demand.lendable if self._config.lending else 0),
            wanted=demand.wanted if self._config.lending else 0,
            wanted_for=demand.wanted_for,
            starved=demand.starved and self._config.lending,
            room_rows=rows,
            room_tokens=tokens,
            lent={debtor: loan.total for debtor, loan in self._rm.loans.items()},
            held=changed,
            results=self._results,
            step_time=self._expected_step_time(),
            chunk_time=self._chunk_time,
            counters=self.counters,
        )
        self._results = []
        self._comm.rounds.report(msgspec.msgpack.encode(report))

    def _places(self) -> dict[int, dict[int, int]]:
        home = self._rm.instance
        return {
            request: {home: len(table.slots)} | {c: len(i) for c, i in table.remote.items()}
            for request, table in self._rm.tables.items()
        }

    # -- steps ----------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter()
        plan = self._scheduler.plan()
        if self._partners:
            self._traffic.announce(plan, self._partners, self._joint_step)
            self._traffic.accept()
            self._steps_left -= 1
            self._joint_step += 1
        exchanging = bool(self._partners) and self._traffic.any_queries
        logits = self._forward.run(plan.rows, self._traffic if exchanging else None)
        if self._partners:
            self._traffic.finish()
        self._append_tokens(plan.rows, logits)
        self._idle = not plan.rows
        self._note_time(plan.rows, exchanging, time.perf_counter() - started)

    def _note_time(self, rows: list[Row], exchanging: bool, took: float) -> None:
        if not rows and not exchanging:
            self._step_time = 0.0
            return
        self.counters.steps += 1
        self.counters.step_time += took
        if any(row.tokens > 1 for row in rows):
            self._chunk_time = smoothed(self._chunk_time, took)
        else:
            self._step_time = smoothed(self._step_time, took)

    def _expected_step_time(self) -> float:
        return max(self._step_time, self._chunk_time if self._scheduler.has_prompts else 0.0)

    def _append_tokens(self, rows: list[Row], logits: torch.Tensor) -> None:
        sampled = []
        for sequence, count in rows:
            if sequence.output_len == 0 or count > 1:
                self.counters.prompt_tokens += count
            sequence.computed += count
            if not sequence.remaining:
                sampled.append(sequence)
        if not sampled:
            return
        tokens = sample(
            logits,
            [sequence.request.sampling for sequence in sampled],
            [len(sequence.tokens) for sequence in sampled],
        )
        now = time.monotonic()
        self.counters.generated_tokens += len(sampled)
        for sequence, token in zip(sampled, tokens, strict=True):
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            sequence.tokens.append(token)
            reason = sequence.finish_reason
            if reason:
                self._finish(sequence, reason, now)

    def _finish(self, sequence: Sequence, reason: str, now: float) -> None:
        self._scheduler.finish(sequence)
        assert sequence.first_token_at is not None
        self._results.append(
            Result(
                id=sequence.id,
                tokens=pack_tokens(sequence.output),
                finish_reason=reason,
                first_token_time=sequence.first_token_at - sequence.assigned_at,
                total_time=now - sequence.assigned_at,
            )
        )

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self._rm.check()
