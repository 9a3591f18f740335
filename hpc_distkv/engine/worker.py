"""The loop of one rank."""

from __future__ import annotations

import time
from functools import partial
from typing import Protocol

import msgspec
import torch

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages import Answer, Result
from hpc_distkv.control.wire import encode_report
from hpc_distkv.control.work import work
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.creditor import Creditor
from hpc_distkv.engine.debtor import Debtor
from hpc_distkv.engine.forward import Forward, Model
from hpc_distkv.engine.instance import Instance, Speed, StepSeconds, StepWork
from hpc_distkv.engine.sampler import sample, sample_logprobs
from hpc_distkv.engine.scheduler import Plan, Row
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.engine.stop import TextDecoder
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.memory.pool import BlockPool

NOTHING = Plan([], [], [], [])


class Leader(Protocol):
    """What rank 0 does beside its own work."""

    gmanager: GManager

    def finish(self, result: Result) -> None:
        """A request has its result."""

    def tick(self) -> None:
        """Called after every control round."""


class Worker:
    """One rank at work: round boundaries, steps, results.

    A rank reports, goes on with its steps, and applies the answer at the first step that finds it
    there; then it reports again. So no rank waits for the answer while it has work, and ranks agree
    on nothing but the order of mail between two of them.

    Why no wait lasts for ever: a rank waits (1) in a step, for its creditors' partial results and
    for moves, and (2) without work, for the answer, hence for every rank's report. In every wait
    and between layers it serves its debtors and, on rank 0, answers rounds; serving waits for
    nothing. So whatever a debtor waits for is done by its creditor sooner or later, wherever that
    one is, even if both are debtors of each other; then every step ends, every rank reports, and
    rank 0 can answer. That rows wait for memory, which is no wait for a message, is bounded by the
    scheduler's patience and the gManager's victims.

    At the end every rank returns what it borrowed and serves on until all loans are settled
    everywhere: no message is left behind.
    """

    def __init__(
        self,
        comm: Comm,
        model: Model,
        pool: BlockPool,
        config: EngineConfig,
        shape: tuple[int, int],
        leader: Leader | None,
        decoder: TextDecoder | None = None,
    ) -> None:
        """`shape`: query heads and head dimension. `leader`: on rank 0 only. `decoder`: for
        requests with stop strings."""
        self._comm, self._leader, self._pool = comm, leader, pool
        self._instance = Instance(comm.world.instance, config, partial(Sequence, decoder=decoder))
        self.counters = self._instance.counters
        self._debtor = Debtor(comm, pool, self._instance, shape)
        self._creditor = Creditor(comm, pool, self._instance, shape, model.attention)
        self._forward = Forward(model, pool, self._instance.rm, self._attend, self._creditor.serve)
        self._answer: Answer | None = None
        self._sharing = config.policy.sharing
        self._attention_tokens = config.attention_tokens
        self._idle = True
        self._leaving = False

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the gManager says stop. Raises StallError and ProtocolError."""
        background = self._comm.waiter.background
        background.append(self._attend)
        try:
            self._loop()
            if self._sharing:
                self._leave()
        finally:
            background.remove(self._attend)

    def _loop(self) -> None:
        self._report()
        while True:
            if self._at_boundary():
                answer = self._take_answer()
                if answer.stop:
                    return
                self._instance.apply(answer, time.monotonic())
                self._creditor.open_credits()
                self._report()
            self._step()

    # -- control --------------------------------------------------------------------------------

    def _at_boundary(self) -> bool:
        return self._idle or self._poll_answer() is not None

    def _poll_answer(self) -> Answer | None:
        self._attend()
        return self._answer

    def _leave(self) -> None:
        """Return what was borrowed, and serve until nobody has anything of this rank's. Credit may
        still come until everybody is here: it goes back at once."""
        self._leaving = True
        rm = self._instance.rm
        self._comm.idle(
            lambda: (not rm.loans and self._creditor.idle) or None, "debtors to return their loans"
        )
        self._comm.share(None)

    def _return_all(self) -> None:
        rm = self._instance.rm
        if any(debt.credit or debt.news for debt in rm.debts.values()):
            for creditor, debt in rm.debts.items():
                rm.return_credit(creditor, debt.credit)
            self._debtor.begin(NOTHING)

    def _take_answer(self) -> Answer:
        started = time.perf_counter()
        answer = self._comm.idle(self._poll_answer, f"the answer of round {self._instance.round}")
        self.counters.control_wait += time.perf_counter() - started
        self._answer = None
        return answer

    def _attend(self) -> None:
        """What goes on beside a rank's own step: debtors are served, and control rounds progress,
        on rank 0 the gManager's part, everywhere one's own."""
        if self._sharing:
            self._creditor.attend()
        if self._leaving:
            self._return_all()
            self._comm.rounds.drained()
            return
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
        started, before = time.perf_counter(), msgspec.structs.replace(self.counters)
        plan = self._instance.plan()
        exchanging = self._sharing and self._debtor.begin(plan)
        logits = self._forward.run(plan.rows, self._debtor if exchanging else None)
        if self._sharing:
            self._debtor.finish(plan)
        done = self._work(plan.rows, exchanging)
        tokens, logprobs = self._sample(plan.rows, logits)
        self._instance.append(plan.rows, tokens, time.monotonic(), logprobs)
        self._idle = not plan.rows
        if plan.rows:
            now = self.counters
            seconds = StepSeconds(
                time.perf_counter() - started,
                now.partial_wait - before.partial_wait,
                now.move_wait + now.serve_time - before.move_wait - before.serve_time,
            )
            self._instance.note_step(done, seconds)

    def _work(self, rows: list[Row], exchanging: bool) -> StepWork:
        tables, size = self._instance.rm.tables, self._pool.block_size
        decodes = [sequence for sequence, count in rows if count == 1]
        return StepWork(
            decodes=len(decodes),
            kv_tokens=sum(s.length - tables[s.id].absent * size for s in decodes),
            prompt_work=sum(
                work(s.computed, s.computed + count, self._attention_tokens)
                for s, count in rows
                if count > 1
            ),
            exchanging=exchanging,
        )

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> tuple[list[int], dict[int, bytes]]:
        """The new tokens of the rows that have all others computed, and records of logprobs."""
        sequences = [row.sequence for row in rows if row.sequence.remaining == row.tokens]
        if not sequences:
            return [], {}
        tokens = sample(logits, sequences)
        return tokens, sample_logprobs(logits, sequences, tokens)

    @property
    def speed(self) -> Speed:
        """What its steps have shown."""
        return self._instance.speed

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self._instance.check()
