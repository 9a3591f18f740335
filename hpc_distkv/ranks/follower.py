"""The ranks of an instance that do not lead it: they replay the leader's log."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
import torch

from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.decide.instance import NO_LOGPROBS
from hpc_distkv.decide.pace import StepSeconds
from hpc_distkv.decide.plan import Plan
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.loop import StepLoop, decode_answer
from hpc_distkv.ranks.mail import (
    Advanced,
    Arrived,
    Boundary,
    Event,
    Left,
    Opened,
    Returned,
    Served,
    StepBegun,
    StepEnded,
    StepTimed,
    fingerprint,
)
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.sampler import NOBODY_DRAWN
from hpc_distkv.step.timesheet import Kind

E = TypeVar("E", bound=Event)


class Follower(StepLoop):
    """A rank that repeats what its instance's leader does, on its own lane's tensors.

    The instance is a deterministic state machine. All that its state takes from outside, the
    moments of the clock included, is an event in the leader's log, in the leader's order. So both
    hold the same tables and make the same plans, and nothing of them travels; a fingerprint in the
    log proves it in every step. Tensors go along lanes: queries, partial results and rBlocks from
    this rank to the ranks of its lane in other instances, sums to the other lanes of its own.

    Events are applied in order. `Arrived`, `Served`, `Opened` and `Returned` are applied whenever
    this rank looks, also in the middle of its step, as they happened to the leader in the middle
    of its own; the others when the loop gets there. `Served` waits until this lane has served that
    step too.

    Why no wait lasts for ever. Order all events of all logs by the time at which their leaders
    recorded them, and let X, of instance I, be the first that some rank r of a lane L never
    applies. All earlier ones are applied everywhere. If X is a boundary, r waits for the answer,
    hence for reports that follow earlier boundaries. `Arrived`, `Opened`, `Returned`, `StepTimed`,
    `StepBegun` and `Advanced` need nothing but the events before them. If X is `StepEnded`, the
    leader has been through all steps that were begun: its creditors' leaders had recorded `Arrived`
    for them, so the ranks of lane L there serve them, which waits for nothing; their sums need the
    other lanes, which have begun them for the same reason; and moves travel by themselves. If X is
    `Served`, the debtor's leader has posted the queries of the last layer, hence summed up all
    layers before with the debtor's rank of lane L, which so has their partial results, and posts
    its own queries of the last layer without waiting for anything. So X is applied after all. And a
    leader waits for a follower only in sums, for the same event, and in rounds, for the last
    boundary.
    """

    def __init__(self, parts: Parts, interrupt: Interrupt) -> None:
        super().__init__(parts)
        self._interrupt = interrupt
        self._leader = self._comm.world.rank - self._comm.world.lane
        self._log: deque[Event] = deque()
        """What the leader has recorded and this rank has not applied."""
        self._begun: StepBegun | None = None
        """The step that the leader has begun and this rank has not."""
        self._ended: StepEnded | None = None
        """The end of the only step that was begun."""

    # -- steps ----------------------------------------------------------------------------------

    def _plan(self, ahead: bool) -> tuple[Plan, float]:
        begun, self._begun = self._begun or self._next(StepBegun), None
        plan = self.instance.plan(ahead)
        if fingerprint(plan) != begun.plan:
            world = self._comm.world
            raise ProtocolError(
                f"{world.name(world.rank)} and {world.name(self._leader)} plan different steps of "
                f"instance {world.instance}: do all ranks run the same version of this program?"
            )
        return plan, begun.now

    def _draw(
        self, logits: torch.Tensor, ends: Sequence[TokenSequence], before: torch.Tensor | None
    ) -> torch.Tensor:
        device = self._comm.device
        if not device.deferred:
            return (
                NOBODY_DRAWN  # No step is launched before the tokens of the one before are known.
            )
        return torch.empty(len(ends), dtype=torch.int64, device=device.place)

    def _goes_on(self, plan: Plan) -> bool:
        event = self._next(Advanced, StepEnded)
        self._ended = event if isinstance(event, StepEnded) else None
        return self._ended is None

    def _results(self) -> tuple[Sequence[int], float, Mapping[int, bytes]]:
        ended, self._ended = self._ended or self._next(StepEnded), None
        return ended.tokens, ended.now, NO_LOGPROBS

    def _seconds(self) -> StepSeconds:
        return self._next(StepTimed).seconds

    # -- control --------------------------------------------------------------------------------

    def _boundary(self) -> tuple[Answer, float] | None:
        match self._next(Boundary, StepBegun):
            case Boundary(now):
                answer, self._answer = self._answer, None
                assert answer is not None  # see `_next`
                return answer, now
            case StepBegun() as begun:
                self._begun = begun
        return None

    def _open_credits(self) -> None:
        self.instance.credits()

    def _report(self) -> None:
        """Take part in a round: what this rank wants of the run; the leader says all else."""
        self.instance.report()
        self._comm.rounds.report(self._interrupt.wish)

    def _push_on(self) -> None:
        """Read the log and apply what does not wait for the loop, serve debtors, and push on the
        control round."""
        self._comm.transport.push()
        while (recorded := self._comm.mail.poll()) is not None:
            self._log.append(self._read(*recorded))
        self._serve()
        while self._log and self._apply(self._log[0]):
            self._log.popleft()
        if self._leaving:
            self._comm.rounds.drained()
        elif self._answer is None and (message := self._comm.rounds.answer()) is not None:
            self._answer = decode_answer(message)

    def _serve(self) -> None:
        self._creditor.push()

    def _leave(self) -> None:
        if self._sharing:
            self._comm.share(None)
            self._next(Left)
        self._comm.gather(b"")

    # -- the log --------------------------------------------------------------------------------

    def _read(self, rank: int, encoded: bytes) -> Event:
        try:
            event: Event = msgspec.msgpack.decode(encoded, type=Event)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the log of rank {rank} is malformed: {error}") from error
        return event

    def _apply(self, event: Event) -> bool:
        """Apply an event that does not wait for the loop. False if it does, or is not due yet."""
        match event:
            case Arrived(debtor, header, now):
                self._creditor.begin(debtor, header, now)
            case Served(debtor):
                if not self._creditor.served(debtor):
                    return False
                self._creditor.commit(debtor)
            case Opened(creditor, blocks):
                self.instance.open_credit(creditor, blocks)
            case Returned(now):
                self._return_credit(now)
            case _:
                return False
        return True

    def _next(self, *kinds: type[E]) -> E:
        """Wait for the next event of the loop, which is one of `kinds`. A boundary stays in the log
        until the answer is there, so that nothing that follows is applied before it."""

        def ready() -> E | None:
            self._push_on()
            head = self._log[0] if self._log else None
            if isinstance(head, Boundary) and self._answer is None:
                return None
            if isinstance(head, kinds):
                return head
            if head is not None and not isinstance(head, Served):
                raise ProtocolError(f"the log of rank {self._leader} has {head} before its turn")
            return None

        def awaited() -> list[int]:
            answered = not self._log or not isinstance(self._log[0], Boundary)
            return [self._leader] if answered else self._comm.rounds.awaited()

        names = " or ".join(kind.__name__ for kind in kinds)
        self._time.enter(Kind.CONTROL)
        event = self._comm.waiter.until(ready, f"its log ({names})", awaited)
        self._time.leave(self.instance.round)
        self._log.popleft()
        return event
