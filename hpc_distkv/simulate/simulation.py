"""A job in virtual time: the product's own instances and gManager, and a clock that events move."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages.reports import Answer, encode_report
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import NOTHING
from hpc_distkv.ids import InstanceId
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.member import Member
from hpc_distkv.simulate.record import Record
from hpc_distkv.simulate.sequence import SizedRequest, SizedSequence
from hpc_distkv.simulate.step import Steps
from hpc_distkv.simulate.workload import TraceRow

QUIET_ROUNDS = 100
"""Rounds in which nothing is computed, after which the job counts as stuck."""


class StuckError(RuntimeError):
    """Rows are left that no round brings on: a fault of the policy, not of its user."""


@dataclass(frozen=True)
class RoundTimes:
    """Times of control rounds in seconds; assumed."""

    floor: float = 0.02
    """Least between the beginnings of two rounds, for idle instances report at once."""
    answer: float = 1e-3
    """From the last report to the answers, and ..."""
    per_instance: float = 1e-5
    """... for every instance."""


class Simulation:
    """Owner of the virtual clock. It is to all instances what `ranks.worker.Worker` is to one:

        round      once every instance has reported, the gManager answers all of them; the answers
                   arrive together a little later
        boundary   of an instance: at the first end of a step that finds the answer, or when the
                   answer comes if there is nothing to do. It applies the answer, tells its debtors
                   of credit, reports, and takes the next step
        step       begins with headers to creditors, and ends later by what is served meanwhile

    All rows are there at the start. Mail takes no time.
    """

    def __init__(
        self, deployment: Deployment, rows: Sequence[TraceRow], rounds: RoundTimes | None = None
    ) -> None:
        """Raises OptionError for a cluster that does not say how fast it is."""
        config, count = deployment.config, deployment.instances
        self.now = 0.0
        """Seconds since the start."""
        self.record = Record()
        self._rounds = rounds or RoundTimes()
        self.members = [
            Member(n, Instance(n, config, SizedSequence)) for n in map(InstanceId, range(count))
        ]
        self._steps = Steps(deployment, self.members)
        self._gmanager = GManager(
            SyncSource(self._requests(deployment, rows)),
            self._steps.links,
            config,
        )
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._scheduled = 0
        self._reports = [b""] * count
        self._missing = count
        self._answers: list[Answer] = []
        self._answered = 0
        """Rounds whose answers have arrived."""
        self._waiting = list(self.members)
        """Instances that have nothing to do before the next answer."""
        self._round_began = -self._rounds.floor
        self._worked, self._quiet = False, 0
        self._done = False
        for member in self.members:
            self._report(member)

    def run(self) -> Record:
        """To the end. Raises StuckError."""
        while self.advance():
            pass
        return self.record

    def advance(self) -> bool:
        """The next event; False: the job is done. Raises StuckError."""
        if self._done:
            return False
        self.now, _, event, subject = heapq.heappop(self._events)
        event(subject)
        return True

    def check(self) -> None:
        """Assert, between two events, that every slot has one owner and that every debt is its
        creditor's loan."""
        owed, lent = {}, {}
        for member in self.members:
            member.instance.check()
            for creditor, debt in member.instance.rm.borrower.debts.items():
                owed[member.number, creditor] = debt.total
            for debtor, loan in member.instance.rm.lender.loans.items():
                lent[debtor, member.number] = loan.total
        assert owed == lent, "debts and loans differ"

    def _at(self, moment: float, event: Callable[[Any], None], subject: Any) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (moment, self._scheduled, event, subject))

    def _requests(self, deployment: Deployment, rows: Sequence[TraceRow]) -> Iterator[SizedRequest]:
        """The rows that fit, as the gManager asks for them."""
        for number, row in enumerate(rows):
            if deployment.fits(row):
                self.record.start(row)
                yield SizedRequest.of(number, row)
            else:
                self.record.refuse()

    # -- control rounds -------------------------------------------------------------------------

    def _report(self, member: Member) -> None:
        self._reports[member.number] = encode_report(member.instance.report())
        self._missing -= 1
        if not self._missing:
            begin = max(self.now, self._round_began + self._rounds.floor)
            self._at(begin, self._round, self._reports)

    def _round(self, reports: Sequence[bytes]) -> None:
        self._round_began, self._missing = self.now, len(self.members)
        started = time.perf_counter()
        answers, results = self._gmanager.round(reports)
        self.record.round(time.perf_counter() - started, reports, answers)
        for result in results:
            self.record.finish(result)
        self._quiet = 0 if self._worked else self._quiet + 1
        self._worked = False
        if self._quiet > QUIET_ROUNDS:
            raise StuckError(f"rows are left, but {QUIET_ROUNDS} rounds brought none of them on")
        delay = self._rounds.answer + self._rounds.per_instance * len(self.members)
        self._at(self.now + delay, self._deliver, answers)

    def _deliver(self, messages: Sequence[bytes]) -> None:
        # Most instances get the same message, and none changes its answer.
        decoded = {m: msgspec.msgpack.decode(m, type=Answer) for m in set(messages)}
        self._answers = [decoded[message] for message in messages]
        self._answered += 1
        if self._answers[0].stop:
            self._leave()
            return
        waiting, self._waiting = self._waiting, []
        for member in waiting:
            self._boundary(member)

    # -- instances ------------------------------------------------------------------------------

    def _boundary(self, member: Member) -> None:
        member.instance.apply(self._answers[member.number], self.now)
        self._open_credits(member)
        self._report(member)
        self._step(member)

    def _open_credits(self, member: Member) -> None:
        for debtor, blocks in member.instance.credits().items():
            self.members[debtor].instance.open_credit(member.number, blocks)

    def _step(self, member: Member) -> None:
        seconds = self._steps.begin(member, self.now)
        if seconds:
            self._at(self.now + seconds, self._end, member)
        else:
            self._end(member)

    def _end(self, member: Member) -> None:
        due = member.due(self.now)
        if due is not None:
            self._at(due, self._end, member)
            return
        busy = self._steps.end(member, self.now)
        if busy:
            self._worked = True
            self.record.seconds = self.now
        if member.instance.round < self._answered:
            self._boundary(member)
        elif busy:
            self._step(member)
        else:
            self._waiting.append(member)

    def _leave(self) -> None:
        """Every instance returns what it borrowed."""
        self._done = True
        for member in self.members:
            self._open_credits(member)
        for member in self.members:
            member.instance.return_credit()
            for creditor, header in member.instance.headers(NOTHING, self.now).items():
                lender = self.members[creditor].instance
                lender.commit_served(member.number, *lender.accept(member.number, header, self.now))
        self.record.counters = self._gmanager.counters
