"""The loop of one rank."""

from __future__ import annotations

import time
from typing import Protocol

import msgspec
import torch

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages import Answer, Result
from hpc_distkv.control.wire import encode_report
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.forward import Forward, Model
from hpc_distkv.engine.instance import Instance, StepWork
from hpc_distkv.engine.sampler import sample
from hpc_distkv.engine.scheduler import Row
from hpc_distkv.engine.traffic import Traffic
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.memory.pool import BlockPool


class Leader(Protocol):
    """What rank 0 does beside its own work."""

    gmanager: GManager

    def finish(self, result: Result) -> None:
        """A request has its result."""

    def tick(self) -> None:
        """Called after every control round."""


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
        self._comm, self._leader, self._pool = comm, leader, pool
        self._instance = Instance(comm.world.instance, config)
        self.counters = self._instance.counters
        scale = shape[1] ** -0.5
        self._forward = Forward(model, pool, self._instance.rm, scale, self._attend_control)
        self._traffic = Traffic(comm, pool, self._instance, shape, scale)
        self._answer: Answer | None = None
        self._partners: list[int] = []
        self._steps_left = 0
        self._joint_step = 0
        self._idle = True

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
                self._instance.apply(answer, time.monotonic())
                self._partners, self._steps_left = answer.partners, answer.steps
                self._joint_step = 0
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
        answer = self._comm.idle(self._poll_answer, f"the answer of round {self._instance.round}")
        self.counters.control_wait += time.perf_counter() - started
        self._answer = None
        return answer

    def _attend_control(self) -> None:
        """Let control rounds progress: on rank 0 the gManager's part, everywhere one's own."""
        if self._leader and (messages := self._comm.rounds.reports()) is not None:
            answers, results = self._leader.gmanager.round(messages)
            self._comm.rounds.reply(answers)
            for result in results:
                self._leader.finish(result)
            self._leader.tick()
        if self._answer is None and (message := self._comm.rounds.answer()) is not None:
            self.counters.bytes_reported += len(message)
            try:
                self._answer = msgspec.msgpack.decode(message, type=Answer)
            except msgspec.DecodeError as error:
                raise ProtocolError(f"the gManager's answer is malformed: {error}") from error

    def _report(self) -> None:
        message = encode_report(self._instance.report())
        self.counters.bytes_reported += len(message)
        self._comm.rounds.report(message)

    # -- steps ----------------------------------------------------------------------------------

    def _step(self) -> None:
        started, waited = time.perf_counter(), self._traffic.waited
        plan = self._instance.plan()
        if self._partners:
            self._traffic.announce(plan, self._partners, self._joint_step)
            self._traffic.accept()
            self._steps_left -= 1
            self._joint_step += 1
        exchanging = bool(self._partners) and self._traffic.any_queries
        logits = self._forward.run(plan.rows, self._traffic if exchanging else None)
        if self._partners:
            self._traffic.finish()
        work = self._work(plan.rows, exchanging)
        self._instance.append(plan.rows, self._sample(plan.rows, logits), time.monotonic())
        self._idle = not plan.rows
        if plan.rows or exchanging:
            took = time.perf_counter() - started
            self._instance.note_step(work, took, self._traffic.waited - waited)
        else:
            self._instance.note_idle()

    def _work(self, rows: list[Row], exchanging: bool) -> StepWork:
        tables, size = self._instance.rm.tables, self._pool.block_size
        kv_tokens = sum(s.length - tables[s.id].remote_blocks * size for s, _ in rows)
        return StepWork(
            rows=len(rows),
            kv_tokens=kv_tokens + (self._traffic.served_kv if exchanging else 0),
            prompts=any(row.tokens > 1 for row in rows)
            or (exchanging and self._traffic.served_prompts),
        )

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> list[int]:
        """The new tokens of the rows that have all others computed."""
        sequences = [row.sequence for row in rows if row.sequence.remaining == row.tokens]
        if not sequences:
            return []
        return sample(
            logits,
            [sequence.request.sampling for sequence in sequences],
            [sequence.length for sequence in sequences],
        )

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self._instance.check()
