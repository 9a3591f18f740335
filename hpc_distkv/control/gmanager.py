"""The gManager: from the reports of a round to its answers."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.assign.affinity import Affinity
from hpc_distkv.control.assign.assignment import Assignment
from hpc_distkv.control.assign.large import LargeRequests
from hpc_distkv.control.assign.source import RequestSource
from hpc_distkv.control.lending.borrow import ANYWHERE, CANDIDATES, Grant, Need, greedy_borrow
from hpc_distkv.control.lending.dgfm import plan_recalls
from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.lending.planner import Planner
from hpc_distkv.control.lending.reach import ExchangeSeconds, Reach
from hpc_distkv.control.lending.victims import Victims
from hpc_distkv.control.messages.answer import Answer, Answers
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Reports
from hpc_distkv.control.messages.requests import Result
from hpc_distkv.control.policy import POLICIES, Policy

PLAN_EVERY = 5
"""Rounds between two plans: what the last one moved has to show in the reports."""
RECALL_STEPS = 16
"""Steps whose budget for moves one round's recalls may use."""

SAID = ("running", "waiting")
"""What messages tell of an instance's last report."""
Blocks = NDArray[np.int64]


class GManager:
    """Owner of the debt ledger, of every row's whereabouts and of the plan of each round. Pure:
    it sees reports and makes answers; the engine carries both.

    A promise goes, in this order, to debtors that are short, oldest request first; to transfers
    that pay; and back to its own instance, to bring its rBlocks home.

    Progress of the oldest request is guaranteed here. A request that can't go on although all
    younger ones at its home were preempted reports itself starved; then nobody younger is admitted
    anywhere, any promise will do, and if the promises don't suffice, the youngest requests of the
    cluster are preempted, those with rBlocks at the starved request's home first and those nearby
    before others, until the rBlocks it wants are free. Every request fits in the whole cluster, so
    this ends with its finish at the latest when it is alone.

    A run ends early when any rank wants it to: from then on nothing new is begun anywhere, and the
    run is over as soon as nothing runs, or when a rank's time is up.
    """

    def __init__(
        self,
        source: RequestSource,
        links: Links,
        instances: int,
        policy: Policy = POLICIES["lend"],
        *,
        block_size: int = 32,
        move_budget: int = 16,
        attention_tokens: float = float("inf"),
        prefix_caching: bool = False,
        exchange_seconds: ExchangeSeconds = lambda link_class, rows: 0.0,
    ) -> None:
        """`source`: of the requests; `links`: of the instances; `block_size`, `move_budget` (KV
        tokens per step), `attention_tokens` and `prefix_caching` as the engines';
        `exchange_seconds`: (link class, query rows) → what exchanges over such a link add to a
        step."""
        self.ledger = DebtLedger(instances)
        affinity = Affinity(block_size) if prefix_caching and policy.queue else None
        self.assignment = Assignment(source, instances, policy.queue, attention_tokens, affinity)
        self._large_rows = LargeRequests(self.assignment, links, block_size)
        self.counters = [Counters() for _ in range(instances)]
        self.reports: Reports | None = None
        """Of the last round."""
        self.running = 0
        self.round_number = 0
        self.draining = False
        """Whether the run ends before all rows are answered."""
        self._links = links
        self._exchange_seconds = exchange_seconds
        self._policy = policy
        self._planner = (
            Planner(block_size, links, lambda c: exchange_seconds(c, 1)) if policy.planner else None
        )
        self._planned: dict[tuple[int, int], int] = {}
        """(debtor, creditor) → rBlocks of a transfer that are not granted yet."""
        self._block_size, self._move_budget = block_size, move_budget
        self._victims = Victims(self.ledger, links)

    def round(
        self, messages: Sequence[bytes], *, drain: bool = False, halt: bool = False
    ) -> tuple[list[bytes], list[Result]]:
        """One control round: the encoded reports of all instances by instance → an encoded answer
        for each, and the results they carried. `drain` and `halt`, as in reports, come from ranks
        that send none. Raises ReportError, and does nothing, for messages that no healthy instance
        sends."""
        reports = Reports(messages)
        reports.check(self.round_number)
        self.assignment.check(reports, self._policy.migrate)
        self.reports = reports
        results = self._observe(reports)
        self.draining |= drain or bool(reports["drain"].any())
        plain = Answer(round=self.round_number, drain=self.draining)
        answers = Answers(plain)
        if self.draining and (halt or not self.running or reports["halt"].any()):
            plain.stop = True
            return answers.encode(len(reports)), results
        promised = reports["promised"].astype(np.int64)
        starved = self._starved(reports)
        reach = Reach(reports, self._links, self._exchange_seconds, self._policy.lending)
        self._serve_needs(reports, starved, reach, promised, answers)
        if starved is not None:
            plain.admit_before = int(reports["wanted_for"][starved])
            self._victims.call(reports, starved, reach.wanted(starved), answers)
        elif self._planner:
            self._transfer(reports, reach, promised, answers)
        if not self.draining:
            self._assign(reports, reach, answers)
        if self._policy.dgfm and self.ledger.total:
            self._recall(reports, promised, answers)
        plain.stop = self.assignment.done
        self.round_number += 1
        return answers.encode(len(reports)), results

    def last_report(self, instance: int) -> str:
        """What an instance said last, for messages."""
        if self.reports is None:
            return "no report so far"
        numbers = {name: int(self.reports[name][instance]) for name in ("round", *SAID)}
        rows = ", ".join(f"{numbers[name]} rows {name}" for name in SAID)
        return f"its last report was that of round {numbers['round']}, with {rows}"

    def _assign(self, reports: Reports, reach: Reach, answers: Answers) -> None:
        if self._policy.planner:
            self.assignment.rows.large_from = self._block_size * int(reports["capacity"].max())
        step_tokens = reports.step_tokens()
        given = self.assignment.assign(
            reports["room_rows"],
            reports["room_tokens"],
            reports["work_left"],
            step_tokens,
        )
        for instance, rows in given.items():
            answers[instance].assign = rows
        for home, row in self._large_rows.begin(reports, reach.of, step_tokens):
            if row.request not in self.assignment.home:
                request = self.assignment.give_large(row.request, home)
                answers[home].assign = [*answers[home].assign, request]
            answers[home].begin = [*answers[home].begin, row.request]
        if self._policy.queue and not self.assignment.waiting:
            self._spread_tail(reports, given, answers)

    def _observe(self, reports: Reports) -> list[Result]:
        results: list[Result] = []
        for instance, changes in reports.changes.items():
            if changes.lent is not None:
                self.ledger.set_row(instance, changes.lent)
            if changes.counters is not None:
                self.counters[instance] = changes.counters
            results += changes.results
            for request in changes.returned:
                self.assignment.take_back(request)
            self.assignment.home.update(dict.fromkeys(changes.adopted, instance))
        for result in results:
            self.assignment.finish(result)
        self.running = int(reports["running"].sum())
        return results

    def _spread_tail(self, reports: Reports, given: Container[int], answers: Answers) -> None:
        """No row is left to assign: instances that have begun all theirs get half of what waits at
        others with at least twice their work."""
        waiting = np.where(reports["running"] > 0, reports["waiting"], 0)
        left = reports["work_left"].copy()
        able = np.flatnonzero((reports["waiting"] == 0) & (reports["room_rows"] > 0))
        for receiver in able[np.argsort(left[able], kind="stable")].tolist():
            donor = int(np.where(waiting > 0, left, 0.0).argmax())
            if not waiting[donor] or 2 * left[receiver] > left[donor]:
                return
            if receiver not in given:
                share = (int(waiting[donor]) + 1) // 2
                answers[donor].give_back += share
                waiting[donor] -= share
                left[donor] /= 2

    # -- loans ----------------------------------------------------------------------------------

    def _serve_needs(
        self,
        reports: Reports,
        starved: int | None,
        reach: Reach,
        promised: Blocks,
        answers: Answers,
    ) -> None:
        """Grants for those that are short, oldest request first."""
        needs = [
            Need(
                int(reports["wanted_for"][i]),
                i,
                self._need(reports, i),
                ANYWHERE if i == starved else reach.wanted(i),
                1 if self._policy.migrate else CANDIDATES,
            )
            for i in np.flatnonzero(reports["wanted"]).tolist()
        ]
        for grant in greedy_borrow(needs, promised, self.ledger, self._links):
            self._enter(grant, answers)
        self._keep(reports, needs, answers)

    def _keep(self, reports: Reports, needs: Sequence[Need], answers: Answers) -> None:
        """What becomes free is left to rows that are too large for their homes and go on."""
        going_on = {
            instance
            for instance, changes in reports.changes.items()
            if any(row.begun for row in changes.large)
        }
        keep = np.zeros(len(reports))
        for need in needs:
            missing = need.blocks - answers[need.debtor].granted
            if missing <= 0 or need.debtor not in going_on:
                continue
            near = self._links.classes(need.debtor) <= need.reach
            near[need.debtor] = False
            creditors = np.flatnonzero(near)
            if len(creditors) > missing:
                free = reports["free"][creditors]
                creditors = creditors[np.argpartition(-free, missing - 1)[:missing]]
            keep[creditors] += missing / max(1, len(creditors))
            keep[need.debtor] += reports["free"][need.debtor]
        for instance in np.flatnonzero(keep).tolist():
            answers[instance].keep += math.ceil(keep[instance])

    def _need(self, reports: Reports, instance: int) -> int:
        """A request that migrates needs room for all of itself."""
        wanted = int(reports["wanted"][instance])
        return wanted + int(reports["longest"][instance]) if self._policy.migrate else wanted

    def _enter(self, grant: Grant, answers: Answers) -> None:
        lend = answers[grant.creditor].lend
        lend[grant.debtor] = lend.get(grant.debtor, 0) + grant.blocks
        answers[grant.debtor].granted += grant.blocks

    def _transfer(self, reports: Reports, reach: Reach, promised: Blocks, answers: Answers) -> None:
        """Go on with the transfers that pay: grant what their creditors have promised, and let
        them keep free what is missing."""
        assert self._planner
        if self.round_number % PLAN_EVERY == 0 and self._move_budget:
            plan = self._planner.plan(
                reports,
                self.ledger,
                self.assignment.waiting,
                reach.wanted,
                self.assignment.prompt_work,
            )
            self._planned = {(t.debtor, t.creditor): t.blocks for t in plan}
        for (debtor, creditor), blocks in list(self._planned.items()):
            granted = min(blocks, int(promised[creditor]))
            if granted:
                promised[creditor] -= granted
                self.ledger.grant(debtor, creditor, granted)
                self._enter(Grant(debtor, creditor, granted), answers)
                answers[debtor].shed[creditor] = granted
            self._planned[debtor, creditor] -= granted
            answers[creditor].keep += blocks - granted

    def _recall(self, reports: Reports, promised: Blocks, answers: Answers) -> None:
        """DGFM: what is left of a debtor's own promise takes its rBlocks in, unless their loans
        pay; and circles of debts are cancelled."""
        spare: dict[int, int] = {}
        for debtor in np.flatnonzero(promised).tolist():
            creditors = self.ledger.creditors_of(debtor)
            if creditors and not (
                self._planner and self._planner.pays(debtor, self.ledger, reports)
            ):
                new = sum(request.length for request in answers[debtor].assign)
                spare[debtor] = int(promised[debtor]) - new // self._block_size
        urgent = set(np.flatnonzero(reports["wanted"]).tolist())
        budget = RECALL_STEPS * self._move_budget // self._block_size
        for debtor, creditor, blocks in plan_recalls(
            self.ledger, spare, self._links, budget, urgent
        ):
            answers[debtor].recall[creditor] = blocks

    # -- starvation -----------------------------------------------------------------------------

    def _starved(self, reports: Reports) -> int | None:
        """The instance of the oldest request that cannot go on."""
        if not self._policy.lending:
            return None
        starved = np.flatnonzero(reports["starved"]).tolist()
        return min(starved, key=lambda i: int(reports["wanted_for"][i]), default=None)
