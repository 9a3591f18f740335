"""The loop of every rank: control rounds, and steps of plan → compute → learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.control.messages.requests import work
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.pace import StepSeconds, StepWork
from hpc_distkv.decide.plan import NOTHING, Plan, Scheduled
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.step.creditor import Creditor
from hpc_distkv.step.debtor import Debtor
from hpc_distkv.step.forward import Elsewhere, Forward
from hpc_distkv.step.host_tier import HostTier
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.timesheet import Kind


@dataclass
class LaunchedStep:
    """A step that the device was asked for."""

    plan: Plan
    drawn: torch.Tensor
    """int64 `[ends]`: its new tokens, on the device."""
    ends: list[TokenSequence] = field(default_factory=list)
    """The sequences that get a new token from this step, in order; empty until `_advance`."""
    work: StepWork | None = None
    """What it has to compute; None until its rows count as computed."""


class StepLoop(ABC):
    """One rank at work: its copy of the instance's books, the tensors of its steps, and the step
    under way. Where the leader of an instance (`Worker`) and its other ranks (`Follower`) differ
    are the abstract methods: the leader decides by its own clock and mail, and its device draws the
    tokens; a follower takes all of that from the leader's log.

    A step is plan → compute → learn. Where the next one may be planned before the tokens of this
    one are known, it is launched first, so that the device always has a step to compute:

        plain       plan n → compute n → learn n → plan n + 1 → …
        overlapped  plan n → compute n → plan n + 1 → compute n + 1 → learn n → …
    """

    def __init__(self, parts: Parts) -> None:
        self._comm, self._time = parts.comm, parts.time
        self._sharing = parts.config.policy.sharing
        sequence = partial(TokenSequence, decoder=parts.decoder)
        self.instance = Instance(parts.comm.world.instance, parts.config, sequence)
        self._creditor = Creditor(parts, self.instance)
        self._debtor = Debtor(parts, self.instance)
        self._host = HostTier(parts, parts.host_pool, self.instance.rm) if parts.host_pool else None
        self._forward = Forward(parts, self.instance.rm, self._push_on, self._serve)
        self._lanes = parts.model.lanes
        self._block_size = parts.pool.block_size
        self._attention_tokens = parts.config.attention_tokens
        self._exchanging = False
        self._idle = True
        """Whether the last step had nothing to do."""
        self._under_way: LaunchedStep | None = None
        """The step that the device computes while the next one is planned."""
        self._answer: Answer | None = None
        """Of the current round, until it is applied."""
        self._leaving = False
        """Whether the run is over."""

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the gManager says stop. Raises StallError and ProtocolError."""
        with self._comm.waiter.meanwhile(self._push_on):
            self._loop()
            self._leaving = True
            self._leave()

    def _loop(self) -> None:
        self._report()
        while True:
            if boundary := self._boundary():
                answer, now = boundary
                if answer.stop or answer.preempt:
                    self._end_under_way()  # It uses what is freed.
                if answer.stop:
                    self.instance.stop()
                    return
                self.instance.apply(answer, now)
                self._open_credits()
                self._report()
            before, self._under_way = self._under_way, None
            if before is None:
                self._step()
            else:
                self._overlapped_step(before)

    # -- where leader and follower differ -------------------------------------------------------

    @abstractmethod
    def _push_on(self) -> None:
        """Push on all that goes on beside a step: mail, debtors, control rounds. Never blocks."""

    @abstractmethod
    def _serve(self) -> None:
        """Push on the steps of debtors. Never blocks, and costs next to nothing without one."""

    @abstractmethod
    def _report(self) -> None:
        """Begin a control round."""

    @abstractmethod
    def _boundary(self) -> tuple[Answer, float] | None:
        """The round's answer and the leader's time, if it is applied before the next step."""

    @abstractmethod
    def _open_credits(self) -> None:
        """Set aside what the answer lends to others, of which the leader tells them."""

    @abstractmethod
    def _plan(self, ahead: bool) -> tuple[Plan, float]:
        """The next step, and the leader's time; `ahead`: while the one before is computed."""

    @abstractmethod
    def _draw(
        self, logits: torch.Tensor, ends: Sequence[TokenSequence], before: torch.Tensor | None
    ) -> torch.Tensor:
        """Ask for the next tokens of the `ends`, int64 `[ends]` on the device. `logits`: `[ends,
        vocab]` on the leader; `before`: those of the step before, if the host does not know
        them."""

    @abstractmethod
    def _goes_on(self, plan: Plan) -> bool:
        """Whether the next step is planned before the tokens of this one are known."""

    @abstractmethod
    def _results(self) -> tuple[Sequence[int], float, Mapping[int, bytes]]:
        """Wait for the oldest step that was drawn and not learnt: its new tokens, the leader's time
        when it had them, and on the leader request → record of its log-probabilities."""

    @abstractmethod
    def _seconds(self) -> StepSeconds:
        """How long that step took on the leader."""

    @abstractmethod
    def _leave(self) -> None:
        """Serve until all loans are settled everywhere, and tell rank 0 what was not reported.
        Collective."""

    # -- steps ----------------------------------------------------------------------------------

    def _return_credit(self, now: float) -> None:
        """Give all credit back: the run is over."""
        self.instance.return_credit()
        self._debtor.begin(NOTHING, now)

    def _step(self) -> None:
        plan, now = self._plan(ahead=False)
        self._end_or_go_on(self._compute(plan, now))

    def _overlapped_step(self, before: LaunchedStep) -> None:
        """The same while the device computes the step `before`, which ends here."""
        plan, now = self._plan(ahead=True)
        step = self._compute(plan, now, before.drawn)
        self._learn(before, following={sequence.id for sequence, _ in plan.scheduled})
        self._time.enter(Kind.STEP)
        self._end_or_go_on(step)

    def _compute(self, plan: Plan, now: float, drawn: torch.Tensor | None = None) -> LaunchedStep:
        """Ask the device for the plan's layers, and for the new tokens of the rows that have all
        others computed. `now`: the leader's clock; `drawn`: as of `Forward.run`, on other lanes
        room for it."""
        self._idle = plan.idle and drawn is None
        self._time.enter(Kind.OTHER if self._idle else Kind.STEP)
        logits = self._run_layers(plan, now, drawn)
        ends = [sequence for sequence, count in plan.scheduled if sequence.remaining == count]
        return LaunchedStep(plan, self._draw(logits, ends, drawn))

    def _run_layers(self, plan: Plan, now: float, drawn: torch.Tensor | None) -> torch.Tensor:
        """The plan's headers, moves and layers. Returns the logits of the rows that end, on the
        leader."""
        self._exchanging = self._sharing and self._debtor.begin(plan, now)
        elsewhere: list[Elsewhere] = [self._debtor] if self._exchanging else []
        if self._host and self._host.begin(plan):
            elsewhere.append(self._host)
        if plan.scheduled:
            self._lanes.begin(independent=not self._exchanging)
            if drawn is not None and len(drawn):
                drawn = self._lanes.spread(drawn)
        logits = self._forward.run(plan.scheduled, elsewhere, drawn)
        if self._host:
            self._host.finish()
        if self._sharing:
            self._debtor.finish()
        return logits

    def _end_or_go_on(self, step: LaunchedStep) -> None:
        if self._goes_on(step.plan):
            self._advance(step)
            self._under_way = step
            self._time.leave(record=False)
        else:
            self._learn(step)

    def _advance(self, step: LaunchedStep) -> StepWork:
        """Count the rows of a step as computed, and commit its moves: it is computed, or, if
        nothing moves in it, being computed."""
        rows = step.plan.scheduled
        self.instance.commit(step.plan)
        step.work = done = self._work(rows)
        step.ends = self.instance.advance(rows)
        return done

    def _learn(self, step: LaunchedStep, following: Container[int] = ()) -> None:
        """Wait until the step is over, on the device too, and take its tokens. `following`: the
        requests in the step that the device computes next, if it was launched."""
        tokens, now, logprobs = self._results()
        rows, done = step.plan.scheduled, step.work or self._advance(step)
        self.instance.learn(rows, step.ends, tokens, now, logprobs, following)
        self._time.leave(len(rows), sum(count for _, count in rows), record=bool(rows))
        if rows:
            self.instance.note_step(done, self._seconds())

    def _end_under_way(self) -> None:
        """Nothing is computed any more when this returns."""
        if self._under_way:
            self._time.enter(Kind.STEP)
            step, self._under_way = self._under_way, None
            self._learn(step)

    def _work(self, rows: list[Scheduled[TokenSequence]]) -> StepWork:
        tables, size = self.instance.rm.tables, self._block_size
        decodes = [sequence for sequence, count in rows if count == 1]
        shared = self.instance.rm.prefixes.at_home(sequence.id for sequence in decodes)
        return StepWork(
            decodes=len(decodes),
            kv_tokens=sum(s.length - tables[s.id].absent * size for s in decodes) + size * shared,
            prompt_work=sum(
                work(s.computed, s.computed + count, self._attention_tokens)
                for s, count in rows
                if count > 1
            ),
            exchanging=self._exchanging,
        )


def decode_answer(message: bytes) -> Answer:
    """The gManager's answer. Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(message, type=Answer)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the gManager's answer is malformed: {error}") from error
