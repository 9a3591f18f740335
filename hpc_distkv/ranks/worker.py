"""The rank that leads an instance."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import sub

import msgspec
import torch

from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages.reports import Answer, Remains, encode_report
from hpc_distkv.control.messages.requests import Result, Unfinished
from hpc_distkv.decide.look_ahead import may_plan_ahead
from hpc_distkv.decide.pace import StepSeconds
from hpc_distkv.decide.plan import Plan
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.ranks.interrupt import HALT, Interrupt
from hpc_distkv.ranks.loop import StepLoop, decode_answer
from hpc_distkv.ranks.mail import (
    Advanced,
    Boundary,
    Left,
    Log,
    Mailbox,
    Returned,
    StepBegun,
    StepEnded,
    StepTimed,
    fingerprint,
)
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.sampler import Sampled, begin_sampling
from hpc_distkv.step.timesheet import Kind


class Leader(ABC):
    """What rank 0 does beside its own work."""

    gmanager: GManager

    def ready(self) -> bool:
        """Whether to answer a control round now. False puts it off; the rank asks again soon."""
        return True

    @abstractmethod
    def finish(self, result: Result) -> None:
        """A request has its result."""

    def save(self, unfinished: Unfinished) -> None:  # noqa: B027 (its tokens may be lost)
        """The run has ended before a request did."""

    def tick(self) -> None:  # noqa: B027 (there may be nothing to do)
        """Called after every control round."""


STEP_END = "the end of its step"


class Worker(StepLoop):
    """One instance at work, seen from the first of its ranks: round boundaries, steps, results. Its
    other ranks are `Follower`s, which do what the log of this one says.

    A rank reports, goes on with its steps, and applies the answer at the first step that finds it
    there; then it reports again. So no rank waits for the answer while it has work, and ranks agree
    on nothing but the order of mail between two of them.

    In every wait and between layers it serves its debtors and, on rank 0, answers rounds; serving
    waits for nothing. Why so no wait lasts for ever: `docs/design.md` (for the lanes `Follower`).

    At the end every instance returns what it borrowed and serves on until all loans are settled
    everywhere: no message is left behind. So it is too when the run ends early: what runs is
    stopped first, and its tokens are handed in last, when none of it can be under way any more.
    """

    def __init__(self, parts: Parts, leader: Leader | None, interrupt: Interrupt) -> None:
        """`leader`: on rank 0 only."""
        super().__init__(parts)
        comm = parts.comm
        self._leader, self._interrupt = leader, interrupt
        self._counters = self.instance.counters
        self._log = Log(comm)
        self._mailbox = Mailbox(comm, self.instance, self._creditor, self._log)
        if leader:
            comm.hear(lambda rank: leader.gmanager.last_report(comm.world.instance_of(rank)))
        self._draws: deque[Callable[[], Sampled | None]] = deque()
        """Give the tokens of the steps that the device was asked for, oldest first."""
        self._since = self._clock()
        """When the device could begin the step that ends next."""

    # -- control --------------------------------------------------------------------------------

    def _boundary(self) -> tuple[Answer, float] | None:
        if not self._idle and self._poll_answer() is None:
            return None
        answer, now = self._take_answer(), time.monotonic()
        self._log.record(Boundary(now))
        return answer, now

    def _open_credits(self) -> None:
        self._mailbox.open_credits()

    def _poll_answer(self) -> Answer | None:
        self._push_on()
        return self._answer

    def _leave(self) -> None:
        if self._sharing:
            self._settle()
        self._hand_in()

    def _settle(self) -> None:
        """Return what was borrowed, and serve until nobody has anything of this rank's. Credit may
        still come until everybody is here: it goes back at once."""
        rm, creditor = self.instance.rm, self._creditor
        self._comm.idle(
            lambda: (not rm.lender.loans and creditor.idle) or None, "debtors to return their loans"
        )
        self._comm.share(None)
        self._log.record(Left())

    def _hand_in(self) -> None:
        """Rank 0 gets all that was not reported."""
        messages = self._comm.gather(msgspec.msgpack.encode(self.instance.remains()))
        if not self._leader:
            return
        tp, gmanager = self._comm.world.tp, self._leader.gmanager
        last = [gmanager.last_report(instance) for instance in range(self._comm.world.instances)]
        self._comm.hear(lambda rank: last[rank // tp])  # The leader may go.
        for instance, message in enumerate(messages[::tp]):
            remains = msgspec.msgpack.decode(message, type=Remains)
            gmanager.close(instance, remains.counters)
            for result in remains.results:
                self._leader.finish(result)
            for unfinished in remains.unfinished:
                self._leader.save(unfinished)

    def _return_all(self) -> None:
        debts = self.instance.rm.borrower.debts.values()
        if any(debt.credit or debt.news for debt in debts):
            now = time.monotonic()
            self._log.record(Returned(now))
            self._return_credit(now)

    def _take_answer(self) -> Answer:
        answer = self._answer
        if answer is None:
            what = f"the answer of round {self.instance.round}"
            self._time.enter(Kind.CONTROL)
            answer = self._comm.idle(self._poll_idle, what)
            self._time.leave(self.instance.round)
        self._answer = None
        return answer

    def _poll_idle(self) -> Answer | None:
        answer = self._poll_answer()
        self._time.turn(Kind.CONTROL if self._creditor.idle else Kind.QUERIES)
        return answer

    def _push_on(self) -> None:
        """Read the mail, serve debtors, and push on the control round, on rank 0 the gManager's
        part too."""
        self._comm.transport.push()
        if self._sharing:
            self._mailbox.attend()
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
            self._counters.bytes_reported += len(message)
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
        self._time.fill(self._counters)
        self._time.recorder.open(Kind.ROUND)
        wanted = self._interrupt
        message = encode_report(self.instance.report(wanted.drain, wanted.halt))
        self._counters.bytes_reported += len(message)
        self._comm.rounds.report(message)

    def _serve(self) -> None:
        self._mailbox.serve()

    # -- steps ----------------------------------------------------------------------------------

    def _plan(self, ahead: bool) -> tuple[Plan, float]:
        if not ahead:
            self._since = self._clock()
        plan, now = self.instance.plan(ahead), time.monotonic()
        if self._log.followed:
            self._log.record(StepBegun(now, fingerprint(plan)))
        return plan, now

    def _draw(
        self, logits: torch.Tensor, ends: Sequence[TokenSequence], before: torch.Tensor | None
    ) -> torch.Tensor:
        draw = begin_sampling(self._comm.device, logits, ends, before)
        self._draws.append(draw.ready)
        return draw.tokens

    def _goes_on(self, plan: Plan) -> bool:
        deferred, followed = self._comm.device.deferred, self._log.followed
        going_on = may_plan_ahead(self.instance, plan, deferred=deferred, followed=followed)
        if going_on:
            self._log.record(Advanced())
        return going_on

    def _results(self) -> tuple[Sequence[int], float, Mapping[int, bytes]]:
        ready = self._draws.popleft()
        tokens, logprobs = self._comm.waiter.until(ready, STEP_END, self._other_lanes)
        now = time.monotonic()
        self._log.record(StepEnded(tokens, now))
        return tokens, now, logprobs

    def _seconds(self) -> StepSeconds:
        since, self._since = self._since, self._clock()
        seconds = StepSeconds(*map(sub, self._since, since))
        self._log.record(StepTimed(seconds))
        return seconds

    def _other_lanes(self) -> list[int]:
        """The ranks that this one's device waits for in stream-ordered exchanges."""
        world = self._comm.world
        return [rank for rank in world.members if rank != world.rank]

    def _clock(self) -> tuple[float, float, float]:
        """Seconds so far: all, those waiting for partial results, and those beside steps."""
        spent = self._time.spent
        beside = spent(Kind.MOVES, Kind.SERVE, Kind.HOST)
        return time.perf_counter(), spent(Kind.PARTIALS), beside
