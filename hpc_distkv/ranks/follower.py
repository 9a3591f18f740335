"""The loop of the ranks of an instance that do not lead it."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import TypeVar

import msgspec
import torch

from hpc_distkv.control.messages.answer import Answer
from hpc_distkv.decide.pace import Speed
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.ranks.events import (
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
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.replica import Advance, Replica
from hpc_distkv.ranks.worker import decode_answer
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.recorder import Kind

E = TypeVar("E", bound=Event)


class Follower:
    """A rank that repeats what its instance's leader does, on its own lane's tensors.

    The instance is a deterministic state machine. All that its state takes from outside, the
    moments of the clock included, is an event in the leader's log, in the leader's order. So both
    hold the same tables and make the same plans, and nothing of them travels; a fingerprint in the
    log proves it in every step. Tensors go along lanes: queries, partial results and rBlocks from
    this rank to the ranks of its lane in other instances, sums to the other lanes of its own.

    Events are applied in order. `Arrived`, `Served`, `Opened` and `Returned` are applied whenever
    this rank attends, also in the middle of its step, as they happened to the leader in the middle
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
        self._interrupt = interrupt
        self._comm = comm = parts.comm
        self._time = parts.time
        self._replica = Replica(parts, self._attend, self._serve)
        self._instance, self._creditor = self._replica.instance, self._replica.creditor
        self.counters = self._instance.counters
        self._leader = comm.world.rank - comm.world.lane
        self._log: deque[Event] = deque()
        """What the leader has recorded and this rank has not applied."""
        self._answer: Answer | None = None
        self._under_way: Advance | None = None
        """The step that ends after the next one has begun."""
        self._leaving = False

    @torch.inference_mode()
    def run(self) -> None:
        """Follow until the gManager says stop. Raises StallError and ProtocolError."""
        with self._comm.waiter.meanwhile(self._attend):
            self._loop()
            self._leaving = True
            if self._replica.sharing:
                self._comm.share(None)
                self._next(Left)
            self._comm.gather(b"")

    @property
    def speed(self) -> Speed:
        """What the leader's steps have shown."""
        return self._instance.pace.speed

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self._instance.check()

    def _loop(self) -> None:
        self._report()
        while True:
            match self._next(Boundary, StepBegun):
                case StepBegun() as begun:
                    self._step(begun)
                case Boundary(now):
                    answer, self._answer = self._answer, None
                    assert answer is not None  # see `_next`
                    if answer.stop or answer.preempt:
                        self._end_under_way()
                    if answer.stop:
                        self._instance.stop()
                        return
                    self._instance.apply(answer, now)
                    self._instance.credits()
                    self._report()

    def _step(self, begun: StepBegun) -> None:
        before, self._under_way = self._under_way, None
        plan = self._instance.plan(ahead=before is not None)
        if fingerprint(plan) != begun.plan:
            world = self._comm.world
            raise ProtocolError(
                f"{world.name(world.rank)} and {world.name(self._leader)} plan different steps of "
                f"instance {world.instance}: do all ranks run the same version of this program?"
            )
        self._time.enter(Kind.OTHER if plan.idle and before is None else Kind.STEP)
        self._replica.compute(plan, begun.now, self._room_for_tokens(before))
        if before:
            self._end(
                before, self._next(StepEnded), {sequence.id for sequence, _ in plan.scheduled}
            )
            self._time.enter(Kind.STEP)
        match self._next(Advanced, StepEnded):
            case Advanced():
                self._under_way = self._replica.advance(plan)
                self._time.leave(record=False)
            case StepEnded() as ended:
                self._end(self._replica.advance(plan), ended)

    def _end(self, step: Advance, ended: StepEnded, following: Container[int] = ()) -> None:
        rows, ends, work = step
        self._instance.learn(rows, ends, ended.tokens, ended.now, following=following)
        self._time.leave(len(rows), sum(count for _, count in rows), record=bool(rows))
        if rows:
            self._instance.note_step(work, self._next(StepTimed).seconds)

    def _end_under_way(self) -> None:
        if self._under_way:
            self._time.enter(Kind.STEP)
            step, self._under_way = self._under_way, None
            self._end(step, self._next(StepEnded))

    def _room_for_tokens(self, before: Advance | None) -> torch.Tensor | None:
        """For what the leader's device has drawn in the step before, if the host does not know
        it."""
        if before is None:
            return None
        return torch.empty(len(before.ends), dtype=torch.int64, device=self._comm.device.place)

    # -- control --------------------------------------------------------------------------------

    def _report(self) -> None:
        """Take part in a round: what this rank wants of the run; the leader says all else."""
        self._instance.report()
        self._comm.rounds.report(self._interrupt.wish)

    def _attend(self) -> None:
        """What goes on beside a rank's own step: the log is followed as far as it can be, debtors
        are served, and control rounds progress."""
        self._comm.transport.push()
        while (letter := self._comm.mail.poll()) is not None:
            self._log.append(self._read(*letter))
        self._serve()
        while self._log and self._apply(self._log[0]):
            self._log.popleft()
        if self._leaving:
            self._comm.rounds.drained()
        elif self._answer is None and (message := self._comm.rounds.answer()) is not None:
            self._answer = decode_answer(message)

    def _serve(self) -> None:
        self._creditor.push()

    # -- the log --------------------------------------------------------------------------------

    def _read(self, rank: int, letter: bytes) -> Event:
        try:
            event: Event = msgspec.msgpack.decode(letter, type=Event)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the log of rank {rank} is malformed: {error}") from error
        return event

    def _apply(self, event: Event) -> bool:
        """Apply what does not concern the loop, if it is time."""
        match event:
            case Arrived(debtor, header, now):
                self._creditor.begin(debtor, header, now)
            case Served(debtor):
                if not self._creditor.served(debtor):
                    return False
                self._creditor.commit(debtor)
            case Opened(creditor, blocks):
                self._instance.open_credit(creditor, blocks)
            case Returned(now):
                self._replica.return_all(now)
            case _:
                return False
        return True

    def _next(self, *kinds: type[E]) -> E:
        """Wait for the next event of the loop, which is one of `kinds`. A boundary stays in the log
        until the answer is there, so that nothing that follows is applied before it."""

        def ready() -> E | None:
            self._attend()
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
        self._time.leave(self._instance.round)
        self._log.popleft()
        return event
