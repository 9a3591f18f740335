"""The loop of the rank that leads an instance."""

from __future__ import annotations

import time
from typing import Protocol

import msgspec
import torch

from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages import Answer, Remains, Result, Unfinished
from hpc_distkv.control.wire import encode_report
from hpc_distkv.engine.events import (
    Boundary,
    Left,
    Log,
    Returned,
    StepBegun,
    StepEnded,
    StepTimed,
    fingerprint,
)
from hpc_distkv.engine.interrupt import HALT, Interrupt
from hpc_distkv.engine.lane import Lane, Parts
from hpc_distkv.engine.letters import Letters
from hpc_distkv.engine.pace import Speed, StepSeconds
from hpc_distkv.engine.recorder import Kind
from hpc_distkv.engine.sampler import begin_sampling
from hpc_distkv.engine.scheduler import Row
from hpc_distkv.memory.loan import ProtocolError


class Leader(Protocol):
    """What rank 0 does beside its own work."""

    gmanager: GManager

    def finish(self, result: Result) -> None:
        """A request has its result."""

    def put_aside(self, unfinished: Unfinished) -> None:
        """The run has ended before a request did."""

    def tick(self) -> None:
        """Called after every control round."""


def decode_answer(message: bytes) -> Answer:
    """The gManager's answer. Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(message, type=Answer)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the gManager's answer is malformed: {error}") from error


class Worker:
    """One instance at work, seen from the first of its ranks: round boundaries, steps, results. Its
    other ranks are `Follower`s, which do what the log of this one says.

    A rank reports, goes on with its steps, and applies the answer at the first step that finds it
    there; then it reports again. So no rank waits for the answer while it has work, and ranks agree
    on nothing but the order of mail between two of them.

    Why no wait lasts for ever: a rank waits (1) in a step, for its creditors' partial results, for
    moves and for the other lanes' tensors, and (2) without work, for the answer, hence for every
    rank's report. In every wait and between layers it serves its debtors and, on rank 0, answers
    rounds; serving waits for nothing. So whatever a debtor waits for is done by its creditor sooner
    or later, wherever that one is, even if both are debtors of each other; then every step ends,
    every rank reports, and rank 0 can answer. (For the other lanes see `Follower`.) That rows wait
    for memory, which is no wait for a message, is bounded by the scheduler's patience and the
    gManager's victims.

    At the end every instance returns what it borrowed and serves on until all loans are settled
    everywhere: no message is left behind. So it is too when the run ends early: what runs is set
    aside first, and its tokens are handed in last, when none of it can be under way any more.
    """

    def __init__(self, parts: Parts, leader: Leader | None, interrupt: Interrupt) -> None:
        """`leader`: on rank 0 only."""
        self._comm = comm = parts.comm
        self._leader, self._interrupt = leader, interrupt
        self._time = parts.time
        self._lane = Lane(parts, self._attend, self._serve)
        self._instance = self._lane.instance
        self.counters = self._instance.counters
        self._log = Log(comm)
        self._letters = Letters(comm, self._instance, self._lane.creditor, self._log)
        self._answer: Answer | None = None
        if leader:
            comm.heard = lambda rank: leader.gmanager.last_report(rank // comm.world.tp)
        self._idle = True
        self._leaving = False

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the gManager says stop. Raises StallError and ProtocolError."""
        with self._comm.waiter.meanwhile(self._attend):
            self._loop()
            self._leaving = True
            if self._lane.sharing:
                self._leave()
            self._hand_in()

    def _loop(self) -> None:
        self._report()
        while True:
            if self._at_boundary():
                answer, now = self._take_answer(), time.monotonic()
                self._log.record(Boundary(now))
                if answer.stop:
                    self._instance.put_aside()
                    return
                self._instance.apply(answer, now)
                self._letters.open_credits()
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
        rm, creditor = self._instance.rm, self._lane.creditor
        self._comm.idle(
            lambda: (not rm.loans and creditor.idle) or None, "debtors to return their loans"
        )
        self._comm.share(None)
        self._log.record(Left())

    def _hand_in(self) -> None:
        """Rank 0 gets all that was not reported."""
        messages = self._comm.gather(msgspec.msgpack.encode(self._instance.remains()))
        if not self._leader:
            return
        for instance, message in enumerate(messages[:: self._comm.world.tp]):
            remains = msgspec.msgpack.decode(message, type=Remains)
            self._leader.gmanager.counters[instance] = remains.counters
            for result in remains.results:
                self._leader.finish(result)
            for unfinished in remains.unfinished:
                self._leader.put_aside(unfinished)

    def _return_all(self) -> None:
        debts = self._instance.rm.debts.values()
        if any(debt.credit or debt.news for debt in debts):
            now = time.monotonic()
            self._log.record(Returned(now))
            self._lane.return_all(now)

    def _take_answer(self) -> Answer:
        answer = self._answer
        if answer is None:
            what = f"the answer of round {self._instance.round}"
            self._time.enter(Kind.CONTROL)
            answer = self._comm.idle(self._poll_idle, what)
            self._time.leave(self._instance.round)
        self._answer = None
        return answer

    def _poll_idle(self) -> Answer | None:
        answer = self._poll_answer()
        self._time.turn(Kind.CONTROL if self._lane.creditor.idle else Kind.QUERIES)
        return answer

    def _attend(self) -> None:
        """What goes on beside a rank's own step: debtors are served, and control rounds progress,
        on rank 0 the gManager's part, everywhere one's own."""
        self._comm.transport.push()
        if self._lane.sharing:
            self._letters.attend()
        if self._leaving:
            self._return_all()
            self._comm.rounds.drained()
            return
        if self._leader and (messages := self._comm.rounds.reports()) is not None:
            self._time.enter(Kind.LEAD)
            self._answer_round(self._leader, messages)
            self._time.leave(len(messages))
        if self._answer is None and (message := self._comm.rounds.answer()) is not None:
            self.counters.bytes_reported += len(message)
            self._answer = decode_answer(message)
            self._time.recorder.close(Kind.ROUND, one=self._answer.round)

    def _answer_round(self, leader: Leader, messages: list[bytes]) -> None:
        """The gManager's part. It hears the leaders of instances, and every rank its instance's
        answer; of other ranks it hears what they want of the run."""
        tp = self._comm.world.tp
        wishes = [message for rank, message in enumerate(messages) if rank % tp]
        answers, results = leader.gmanager.round(
            messages[::tp], drain=any(wishes), halt=HALT in wishes
        )
        self._comm.rounds.reply([answer for answer in answers for _ in range(tp)])
        for result in results:
            leader.finish(result)
        leader.tick()

    def _report(self) -> None:
        self._time.fill(self.counters)
        self._time.recorder.open(Kind.ROUND)
        wanted = self._interrupt
        message = encode_report(self._instance.report(wanted.drain, wanted.halt))
        self.counters.bytes_reported += len(message)
        self._comm.rounds.report(message)

    def _serve(self) -> None:
        self._letters.serve()

    # -- steps ----------------------------------------------------------------------------------

    def _step(self) -> None:
        started, waited = time.perf_counter(), self._waited()
        plan, now = self._instance.plan(), time.monotonic()
        self._time.enter(Kind.STEP if plan.rows else Kind.OTHER)
        if self._log.followed:
            self._log.record(StepBegun(now, fingerprint(plan)))
        logits = self._lane.compute(plan, now)
        (tokens, logprobs), now = self._sample(plan.rows, logits), time.monotonic()
        self._log.record(StepEnded(tokens, now))
        done = self._lane.end(plan, tokens, now, logprobs)
        self._idle = plan.idle
        tokens_computed = sum(count for _, count in plan.rows)
        self._time.leave(len(plan.rows), tokens_computed, record=bool(plan.rows))
        if plan.rows:
            partials, beside = self._waited()
            seconds = StepSeconds(
                time.perf_counter() - started, partials - waited[0], beside - waited[1]
            )
            self._log.record(StepTimed(seconds))
            self._instance.note_step(done, seconds)

    def _waited(self) -> tuple[float, float]:
        spent = self._time.spent
        return spent(Kind.PARTIALS), spent(Kind.MOVES, Kind.SERVE, Kind.HOST)

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> tuple[list[int], dict[int, bytes]]:
        """The new tokens of the rows that have all others computed, and records of logprobs. When
        they are there the step is over, on the device too."""
        sequences = [row.sequence for row in rows if row.sequence.remaining == row.tokens]
        ready = begin_sampling(self._comm.device, logits, sequences)
        return self._comm.waiter.until(ready, "the end of its step")

    @property
    def speed(self) -> Speed:
        """What its steps have shown."""
        return self._instance.pace.speed

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self._instance.check()
