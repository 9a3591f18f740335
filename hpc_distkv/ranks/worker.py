"""The loop of the rank that leads an instance."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import NamedTuple, Protocol

import msgspec
import torch

from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages.answer import Answer
from hpc_distkv.control.messages.report import Remains
from hpc_distkv.control.messages.requests import Result, Unfinished
from hpc_distkv.control.messages.wire import encode_report
from hpc_distkv.decide.look_ahead import may_plan_ahead
from hpc_distkv.decide.pace import Speed, StepSeconds
from hpc_distkv.decide.plan import Plan
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.ranks.events import (
    Advanced,
    Boundary,
    Left,
    Log,
    Returned,
    StepBegun,
    StepEnded,
    StepTimed,
    fingerprint,
)
from hpc_distkv.ranks.interrupt import HALT, Interrupt
from hpc_distkv.ranks.mailbox import Letters
from hpc_distkv.ranks.replica import Advance, Replica
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.recorder import Kind
from hpc_distkv.step.sampler import Draw, begin_sampling


class Leader(Protocol):
    """What rank 0 does beside its own work."""

    gmanager: GManager

    def ready(self) -> bool:
        """Whether a control round may be answered. Unless told otherwise, it may."""
        return True

    def finish(self, result: Result) -> None:
        """A request has its result."""

    def save(self, unfinished: Unfinished) -> None:
        """The run has ended before a request did. Unless told otherwise, its tokens are lost."""
        return

    def tick(self) -> None:
        """Called after every control round. Unless told otherwise, there is nothing to do."""
        return


def decode_answer(message: bytes) -> Answer:
    """The gManager's answer. Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(message, type=Answer)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the gManager's answer is malformed: {error}") from error


STEP_END = "the end of its step"


class Step(NamedTuple):
    """A step that the device was asked for."""

    plan: Plan
    draw: Draw
    advance: Advance | None = None
    """If the next one was planned on top of it."""


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
        self._replica = Replica(parts, self._attend, self._serve)
        self._instance = self._replica.instance
        self.counters = self._instance.counters
        self._log = Log(comm)
        self._letters = Letters(comm, self._instance, self._replica.creditor, self._log)
        self._answer: Answer | None = None
        if leader:
            comm.heard = lambda rank: leader.gmanager.last_report(rank // comm.world.tp)
        self._idle = True
        self._leaving = False
        self._under_way: Step | None = None
        """The step that the device computes, if the next one is planned meanwhile."""
        self._since = self._clock()
        """When the device could begin the step that ends next."""

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the gManager says stop. Raises StallError and ProtocolError."""
        with self._comm.waiter.meanwhile(self._attend):
            self._loop()
            self._leaving = True
            if self._replica.sharing:
                self._leave()
            self._hand_in()

    def _loop(self) -> None:
        self._report()
        while True:
            if self._at_boundary():
                answer, now = self._take_answer(), time.monotonic()
                self._log.record(Boundary(now))
                if answer.stop or answer.preempt:
                    self._end_under_way()  # It uses what is freed.
                if answer.stop:
                    self._instance.stop()
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
        rm, creditor = self._instance.rm, self._replica.creditor
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
                self._leader.save(unfinished)

    def _return_all(self) -> None:
        debts = self._instance.rm.debts.values()
        if any(debt.credit or debt.news for debt in debts):
            now = time.monotonic()
            self._log.record(Returned(now))
            self._replica.return_all(now)

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
        self._time.turn(Kind.CONTROL if self._replica.creditor.idle else Kind.QUERIES)
        return answer

    def _attend(self) -> None:
        """What goes on beside a rank's own step: debtors are served, and control rounds progress,
        on rank 0 the gManager's part, everywhere one's own."""
        self._comm.transport.push()
        if self._replica.sharing:
            self._letters.attend()
        if self._leaving:
            self._return_all()
            self._comm.rounds.drained()
            return
        leader = self._leader
        if leader and leader.ready() and (messages := self._comm.rounds.reports()) is not None:
            self._time.enter(Kind.LEAD)
            self._answer_round(leader, messages)
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
        """Begin a step and end it; or, if the next one may be planned while the device computes
        it, end the one before instead, so that the device always has a step to compute."""
        before, self._under_way = self._under_way, None
        if before is None:
            self._since = self._clock()
        plan, now = self._instance.plan(ahead=before is not None), time.monotonic()
        self._idle = plan.idle and before is None
        self._time.enter(Kind.OTHER if self._idle else Kind.STEP)
        if self._log.followed:
            self._log.record(StepBegun(now, fingerprint(plan)))
        step = self._begin(plan, now, before.draw.tokens if before else None)
        if before:
            self._end(before, {sequence.id for sequence, _ in plan.scheduled})
            self._time.enter(Kind.STEP)
        if self._may_go_on(plan):
            self._log.record(Advanced())
            self._under_way = step._replace(advance=self._replica.advance(plan))
            self._time.leave(record=False)
        else:
            self._end(step)

    def _begin(self, plan: Plan, now: float, drawn: torch.Tensor | None) -> Step:
        """Ask the device for the layers, and for the new tokens of the rows that have all others
        computed."""
        logits = self._replica.compute(plan, now, drawn)
        ends = [row.sequence for row in plan.scheduled if row.sequence.remaining == row.tokens]
        return Step(plan, begin_sampling(self._comm.device, logits, ends, drawn))

    def _may_go_on(self, plan: Plan) -> bool:
        """True if the step after this one may be planned while the device computes this one."""
        deferred, followed = self._comm.device.deferred, self._log.followed
        return may_plan_ahead(self._instance, plan, deferred=deferred, followed=followed)

    def _end(self, step: Step, following: Container[int] = ()) -> None:
        """Wait until the step is over, on the device too: its tokens are there. `following`: the
        requests in the step that the device computes next, if it was begun."""
        ready = step.draw.ready
        tokens, logprobs = self._comm.waiter.until(ready, STEP_END, self._other_lanes)
        now = time.monotonic()
        self._log.record(StepEnded(tokens, now))
        rows, ends, work = step.advance or self._replica.advance(step.plan)
        self._instance.learn(rows, ends, tokens, now, logprobs, following)
        self._time.leave(len(rows), sum(count for _, count in rows), record=bool(rows))
        since, self._since = self._since, self._clock()
        if rows:
            seconds = StepSeconds(
                *(end - begin for begin, end in zip(since, self._since, strict=True))
            )
            self._log.record(StepTimed(seconds))
            self._instance.note_step(work, seconds)

    def _other_lanes(self) -> list[int]:
        """Who may hold up what the device computes: in a hop it waits for all of them."""
        world = self._comm.world
        return [rank for rank in world.members if rank != world.rank]

    def _end_under_way(self) -> None:
        """Nothing is computed any more when this returns."""
        if self._under_way:
            self._time.enter(Kind.STEP)
            step, self._under_way = self._under_way, None
            self._end(step)

    def _clock(self) -> tuple[float, float, float]:
        """Seconds so far: all, those waiting for partial results, and those beside steps."""
        spent = self._time.spent
        beside = spent(Kind.MOVES, Kind.SERVE, Kind.HOST)
        return time.perf_counter(), spent(Kind.PARTIALS), beside

    @property
    def speed(self) -> Speed:
        """What its steps have shown."""
        return self._instance.pace.speed

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self._instance.check()
