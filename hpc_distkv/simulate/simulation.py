"""A job in virtual time: the product's own instances and gManager, and a clock that events move."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.links import Links
from hpc_distkv.control.messages import Answer
from hpc_distkv.control.wire import encode_report
from hpc_distkv.engine.instance import Instance
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.group import Group, Member, form_groups
from hpc_distkv.simulate.report import Record
from hpc_distkv.simulate.sequence import SizedRequest, SizedSequence
from hpc_distkv.simulate.step import Steps
from hpc_distkv.simulate.trace import Row

QUIET_ROUNDS = 1000
"""Rounds in which nothing is computed, after which the job counts as stuck."""


class StuckError(RuntimeError):
    """Rows are left that no round will ever bring on: a fault of the policy, not of its user."""


@dataclass(frozen=True)
class Rounds:
    """Times of control rounds in seconds; assumed."""

    floor: float = 0.02
    """Least between two rounds: idle instances would answer at once."""
    answer: float = 1e-3
    """From the last report to the answers, and ..."""
    per_instance: float = 5e-6
    """... for every instance."""


class Simulation:
    """Owner of the virtual clock. It is to all instances what `engine.worker.Worker` is to one:

        round      once every instance has reported the gManager answers all of them; the answers
                   arrive together a little later
        boundary   of a component after the announced number of joint steps, of an instance alone
                   at its first step that finds the answer. Who is there before the answer, and who
                   is alone with nothing to do, waits for it
        step       of a group once all its members have passed the boundary at which it forms

    All rows are there at the start. What a group does in a step is done at once, with the times
    of its end: nobody else looks at it before its next boundary.
    """

    def __init__(
        self, deployment: Deployment, rows: Sequence[Row], rounds: Rounds | None = None
    ) -> None:
        """Raises OptionError for a deployment that has no cost model."""
        config, count = deployment.config, deployment.instances
        self.now = 0.0
        """Seconds since the start."""
        self.record = Record()
        self._rounds = rounds or Rounds()
        self._steps = Steps(deployment)
        self._members = [Member(n, Instance(n, config, SizedSequence)) for n in range(count)]
        self._gmanager = GManager(
            self._requests(deployment, rows),
            Links(*deployment.places()),
            count,
            config.policy,
            block_size=config.block_size,
            move_budget=config.move_budget,
            max_tokens=config.max_num_batched_tokens,
            attention_tokens=config.attention_tokens,
            exchange_seconds=lambda level: self._steps.cost.exchange_time(1, level),
        )
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._scheduled = self._quiet = 0
        self._reports = [b""] * count
        self._missing = count
        self._round_started = -self._rounds.floor
        self._answers: list[Answer] = []
        self._answered = 0
        """Rounds whose answers have arrived."""
        self._waiting = [member.alone for member in self._members]
        """Groups at a boundary whose answer has not arrived."""
        self._stopped = False
        for member in self._members:
            self._report(member)

    def run(self) -> Record:
        """To the end. Raises StuckError."""
        while self.advance():
            pass
        return self.record

    def advance(self) -> bool:
        """The next event; False: there is none, the job is done. Between two events no message
        between partners is under way. Raises StuckError."""
        if self._stopped:
            return False
        self.now, _, event, arguments = heapq.heappop(self._events)
        event(*arguments)
        return True

    def check(self) -> None:
        """Assert that every slot has one owner, and that every debt is a creditor's loan."""
        owed, lent = {}, {}
        for member in self._members:
            member.instance.check()
            for creditor, debt in member.instance.rm.debts.items():
                owed[member.number, creditor] = debt.total
            for debtor, loan in member.instance.rm.loans.items():
                if told := loan.total - loan.unopened:
                    lent[debtor, member.number] = told
        assert owed == lent, "debts and loans differ"

    def _at(self, moment: float, event: Callable[..., None], *arguments: object) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (moment, self._scheduled, event, arguments))

    def _requests(self, deployment: Deployment, rows: Sequence[Row]) -> Iterator[SizedRequest]:
        """The rows that fit, as the gManager asks for them."""
        for number, row in enumerate(rows):
            if deployment.fits(row):
                self.record.start(row)
                yield SizedRequest.of(number, row.prompt, row.output)
            else:
                self.record.refuse()

    # -- control rounds -------------------------------------------------------------------------

    def _report(self, member: Member) -> None:
        self._reports[member.number] = encode_report(member.instance.report())
        self._missing -= 1
        if not self._missing:
            self._at(max(self.now, self._round_started + self._rounds.floor), self._round)

    def _round(self) -> None:
        self._round_started, self._missing = self.now, len(self._members)
        started = time.perf_counter()
        messages, results = self._gmanager.round(self._reports)
        self.record.round(time.perf_counter() - started, self._reports, messages)
        for result in results:
            self.record.finish(result)
        self._quiet = self._quiet + 1 if self.record.last_step < self.now else 0
        if self._quiet > QUIET_ROUNDS:
            raise StuckError(f"rows are left, but {QUIET_ROUNDS} rounds have brought none of them on")
        delay = self._rounds.answer + self._rounds.per_instance * len(self._members)
        self._at(self.now + delay, self._deliver, messages)

    def _deliver(self, messages: Sequence[bytes]) -> None:
        # Most instances get the same message, and none changes its answer.
        decoded = {m: msgspec.msgpack.decode(m, type=Answer) for m in set(messages)}
        self._answers = [decoded[message] for message in messages]
        self._answered += 1
        if self._answers[0].stop:
            self._stopped = True
            return
        form_groups(self._members, self._answers)
        waiting, self._waiting = self._waiting, []
        for group in waiting:
            self._boundary(group)

    # -- boundaries and steps -------------------------------------------------------------------

    def _boundary(self, group: Group) -> None:
        """The group's members take the answer if it is there, and go on in their next groups."""
        if group.members[0].instance.round == self._answered:
            self._waiting.append(group)
            return
        formed = []
        for member in group.members:
            answer = self._answers[member.number]
            member.instance.apply(answer, self.now)
            member.partners, member.ready = answer.partners, self.now
            self._report(member)
            member.next.missing -= 1
            if not member.next.missing:
                formed.append(member.next)
        for each in formed:
            self._step(each)

    def _step(self, group: Group) -> None:
        if group.joint:
            end: float | None = self._steps.joint(group, self.now)
            ...

    def _advance(self, group: Group) -> None:
        ...
