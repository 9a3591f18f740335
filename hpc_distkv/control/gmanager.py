"""The gManager: from the reports of a round to its answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence

import numpy as np

from hpc_distkv.control.assign.assignment import Assignment
from hpc_distkv.control.assign.large import begin_large
from hpc_distkv.control.assign.queue import NOT_LARGE, RequestSource
from hpc_distkv.control.lending.borrow import CANDIDATES, Need, greedy_borrow
from hpc_distkv.control.lending.dgfm import plan_recalls
from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import ANYWHERE, Links
from hpc_distkv.control.lending.planner import Planner
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Reports
from hpc_distkv.control.messages.requests import Result
from hpc_distkv.control.policy import ControlConfig
from hpc_distkv.control.round import Round
from hpc_distkv.ids import InstanceId

PLAN_EVERY = 5
"""Rounds between two plans: what the last one moved has to show in the reports."""
RECALL_STEPS = 16
"""Steps whose budget for moves one round's recalls may use."""


class GManager:
    """Owner of the debt ledger, of every request's whereabouts and of the plan of each round. Pure:
    it sees reports and makes answers; the engine carries both.

    A promise goes, in this order, to debtors that are short, oldest request first; to transfers
    that pay; and back to its own instance, to bring its rBlocks home.

    Progress of the oldest request is guaranteed here. A request that can't go on although all
    younger ones at its home were preempted reports itself starved; then nobody younger is admitted
    anywhere, any promise will do, and if the promises don't suffice, `Victims` are preempted. Every
    request fits in the whole cluster, so this ends with its finish at the latest when it is alone.

    A run ends early when any rank wants it to: from then on nothing new is begun anywhere, and the
    run is over as soon as nothing runs, or when a rank's time is up.
    """

    def __init__(self, source: RequestSource, links: Links, config: ControlConfig) -> None:
        """`source`: of the requests to answer; `links`: between the instances; `config`: of every
        instance."""
        self.ledger = DebtLedger(len(links))
        self.assignment = Assignment(source, len(links), config)
        self.counters = [Counters() for _ in range(len(links))]
        self.reports: Reports | None = None
        """Of the last round."""
        self.running = 0
        self.round_number = 0
        self.draining = False
        """Whether the run ends before all requests are answered."""
        self._links, self._config, self._policy = links, config, config.policy
        self._planner = Planner(config.block_size) if config.policy.planner else None
        self._planned: dict[tuple[int, int], int] = {}
        """(debtor, creditor) → rBlocks of a transfer that are not granted yet."""
        self._victims = Victims()

    def round(
        self, messages: Sequence[bytes], *, drain: bool = False, halt: bool = False
    ) -> tuple[list[bytes], list[Result]]:
        """One control round: the encoded reports of all instances by instance → an encoded answer
        for each, and the results they carried. `drain` and `halt`, as in reports, come from ranks
        that send none. Raises ReportError, and does nothing, for messages that no healthy instance
        sends."""
        reports = Reports.decode(messages)
        reports.check(self.round_number)
        self.assignment.check(reports, self._policy.migrate)
        self.reports = reports
        results = self._observe(reports)
        self.draining |= drain or bool(reports.drain.any())
        round = Round(reports, self.ledger, self._links, self._policy.lending)
        round.plain.drain = self.draining
        if self.draining and (halt or not self.running or reports.halt.any()):
            round.plain.stop = True
            return round.encode(), results
        self._serve_needs(round)
        if round.starved is not None:
            round.plain.admit_before = int(reports.wanted_for[round.starved])
            self._victims.call(round, round.starved)
        elif self._planner:
            self._transfer(round, self._planner)
        if not self.draining:
            self._assign(round)
        if self._policy.dgfm and self.ledger.total:
            self._recall(round)
        round.plain.stop = self.assignment.done
        self.round_number += 1
        return round.encode(), results

    def close(self, instance: int, counters: Counters) -> None:
        """An instance has ended its run: `counters` are those of all of it."""
        self.counters[instance] = counters

    def last_report(self, instance: int) -> str:
        """What an instance reported last, for messages."""
        if (reports := self.reports) is None:
            return "no report so far"
        return (
            f"its last report was that of round {reports.round[instance]}, with "
            f"{reports.running[instance]} rows running, {reports.waiting[instance]} rows waiting"
        )

    def _observe(self, reports: Reports) -> list[Result]:
        """Enter what has changed at the instances. Returns the results."""
        results: list[Result] = []
        for instance, changes in reports.changes.items():
            if changes.lent is not None:
                self.ledger.set_lent(instance, changes.lent)
            if changes.counters is not None:
                self.counters[instance] = changes.counters
            results += changes.results
            for request in changes.returned:
                self.assignment.take_back(request)
            self.assignment.home.update(dict.fromkeys(changes.adopted, instance))
        for result in results:
            self.assignment.finish(result)
        self.running = int(reports.running.sum())
        return results

    # -- requests -------------------------------------------------------------------------------

    def _assign(self, round: Round) -> None:
        """Give waiting requests to instances, and let large ones begin."""
        reports, assignment = round.reports, self.assignment
        step_tokens = reports.step_tokens()
        largest_pool = self._config.block_size * int(reports.capacity.max())
        given = assignment.assign(
            reports.room_requests,
            reports.room_tokens,
            reports.work_left,
            step_tokens,
            largest_pool if self._policy.planner else NOT_LARGE,
        )
        for instance, requests in given.items():
            round.answer(instance).assign = requests
        for home, large in begin_large(round, assignment, step_tokens):
            answer = round.answer(home)
            if large.request not in assignment.home:
                answer.assign = [*answer.assign, assignment.give_large(large.request, home)]
            answer.begin = [*answer.begin, large.request]
        if self._policy.queue and not assignment.waiting:
            self._spread_tail(round, given)

    def _spread_tail(self, round: Round, given: Container[int]) -> None:
        """No request is left to assign: instances that have begun all theirs get half of what waits
        at others with at least twice their work. `given`: instances that have just got some."""
        reports = round.reports
        waiting = np.where(reports.running > 0, reports.waiting, 0)
        left = reports.work_left.copy()
        able = np.flatnonzero((reports.waiting == 0) & (reports.room_requests > 0))
        for receiver in able[np.argsort(left[able], kind="stable")].tolist():
            donor = int(np.where(waiting > 0, left, 0.0).argmax())
            if not waiting[donor] or 2 * left[receiver] > left[donor]:
                return
            if receiver not in given:
                share = (int(waiting[donor]) + 1) // 2
                round.answer(donor).give_back += share
                waiting[donor] -= share
                left[donor] /= 2

    # -- loans ----------------------------------------------------------------------------------

    def _serve_needs(self, round: Round) -> None:
        """Grant what those that are short want, oldest request first."""
        reports, migrate = round.reports, self._policy.migrate
        needs = [
            Need(
                int(reports.wanted_for[i]),
                i,
                # A request that migrates needs room for all of itself.
                int(reports.wanted[i]) + (int(reports.longest[i]) if migrate else 0),
                ANYWHERE if i == round.starved else round.reach(i),
                1 if migrate else CANDIDATES,
            )
            for i in np.flatnonzero(reports.wanted).tolist()
        ]
        greedy_borrow(needs, round)
        self._keep(round, needs)

    def _keep(self, round: Round, needs: Sequence[Need]) -> None:
        """Tell creditors to admit nothing into memory that a running request too large for its home
        still lacks."""
        reports = round.reports
        going_on = {
            instance
            for instance, changes in reports.changes.items()
            if any(large.begun for large in changes.large)
        }
        keep = np.zeros(len(reports))
        for need in needs:
            missing = need.blocks - round.answer(need.debtor).granted
            if missing <= 0 or need.debtor not in going_on:
                continue
            near = self._links.classes(need.debtor) <= need.reach
            near[need.debtor] = False
            creditors = np.flatnonzero(near)
            if len(creditors) > missing:
                free = reports.free[creditors]
                creditors = creditors[np.argpartition(-free, missing - 1)[:missing]]
            keep[creditors] += missing / max(1, len(creditors))
            keep[need.debtor] += reports.free[need.debtor]
        for instance in np.flatnonzero(keep).tolist():
            round.answer(instance).keep += math.ceil(keep[instance])

    def _transfer(self, round: Round, planner: Planner) -> None:
        """Go on with the transfers that pay: grant what their creditors have promised, and let
        them keep free what is missing."""
        if self.round_number % PLAN_EVERY == 0 and self._config.move_budget:
            plan = planner.plan(round, self.assignment.waiting, self.assignment.prompt_work)
            self._planned = {(t.debtor, t.creditor): t.blocks for t in plan}
        for (debtor, creditor), blocks in list(self._planned.items()):
            granted = min(blocks, int(round.promised[creditor]))
            if granted:
                round.grant(debtor, creditor, granted)
                round.answer(debtor).shed[InstanceId(creditor)] = granted
            self._planned[debtor, creditor] -= granted
            round.answer(creditor).keep += blocks - granted

    def _recall(self, round: Round) -> None:
        """DGFM: a debtor that promised memory which nobody was granted brings its own rBlocks
        home, unless their loans pay; and circles of debts are cancelled."""
        size, planner = self._config.block_size, self._planner
        spare: dict[int, int] = {}
        for debtor in np.flatnonzero(round.promised).tolist():
            if self.ledger.creditors_of(debtor) and not (planner and planner.pays(round, debtor)):
                new = sum(request.length for request in round.answer(debtor).assign)
                spare[debtor] = int(round.promised[debtor]) - new // size
        urgent = set(np.flatnonzero(round.reports.wanted).tolist())
        budget = RECALL_STEPS * self._config.move_budget // size
        recalls = plan_recalls(self.ledger, spare, self._links, budget, urgent)
        for debtor, creditor, blocks in recalls:
            round.answer(debtor).recall[InstanceId(creditor)] = blocks


log = logging.getLogger(__name__)

PATIENCE = 3
"""Rounds between two calls for victims: the blocks of the last ones need that long to show."""


class Victims:
    """Has younger requests preempted, round by round, until a starved one has what it wants: first
    those that have rBlocks at its home and those nearby, then the youngest."""

    def __init__(self) -> None:
        self._next_call = 0
        """The first round that may call again."""

    def call(self, round: Round, starved: int) -> None:
        """`starved`: the home of the request."""
        reports, ledger, now = round.reports, round.ledger, round.plain.round
        missing = int(reports.wanted[starved]) - round.answer(starved).granted
        if missing <= 0 or now < self._next_call:
            return
        self._next_call = now + PATIENCE
        oldest, youngest = int(reports.wanted_for[starved]), reports.youngest
        near = round.links.classes(starved) <= round.reach(starved)
        order = [int(i) for i in np.argsort(-youngest) if youngest[i] > oldest]
        order.sort(key=lambda i: not (near[i] or any(near[c] for c in ledger.creditors_of(i))))
        guests = ledger.debtors_of(starved)
        for instance in [i for i in order if i in guests]:
            blocks = min(missing, guests[instance])
            if blocks > 0:
                answer = round.answer(instance)
                answer.preempt, answer.preempt_at = blocks, InstanceId(starved)
                missing -= blocks
        for instance in [i for i in order if not round.answer(i).preempt]:
            if missing <= 0:
                break
            blocks = min(missing, int(reports.youngest_blocks[instance]))
            round.answer(instance).preempt = blocks
            missing -= blocks
        log.debug("request %d is starved: others are preempted", oldest)
