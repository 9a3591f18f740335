"""The gManager: from the reports of a round to its answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.affinity import Affinity
from hpc_distkv.control.assign import Assignment
from hpc_distkv.control.borrow import ANYWHERE, CANDIDATES, Grant, Need, greedy_borrow
from hpc_distkv.control.dgfm import plan_recalls
from hpc_distkv.control.large import LargeRows
from hpc_distkv.control.ledger import DebtLedger
from hpc_distkv.control.links import Links
from hpc_distkv.control.messages import Answer, Counters, Request, Result
from hpc_distkv.control.planner import Planner
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.control.wire import ReportError, Reports
from hpc_distkv.control.work import STEP_TOKENS

log = logging.getLogger(__name__)

PATIENCE = 3
"""Rounds between two calls for victims: the blocks of the last ones need that long to show."""
PLAN_EVERY = 5
"""Rounds between two plans: what the last one moved has to show in the reports."""
ROOMY = 1.1
"""How much larger than a request the pools within its reach are together."""
RECALL_STEPS = 16
"""Steps whose budget for moves one round's recalls may use."""

SAID = ("running", "waiting")
"""What messages tell of an instance's last report."""
PROMPT_ROWS = 1024
"""Query rows for which links are compared with computing."""

Blocks = NDArray[np.int64]
ExchangeSeconds = Callable[[int, int], float]


class Answers(dict[int, Answer]):
    """The answers of a round by instance, those left out being like `plain`."""

    def __init__(self, plain: Answer) -> None:
        super().__init__()
        self.plain = plain

    def __missing__(self, instance: int) -> Answer:
        answer = self[instance] = Answer(round=self.plain.round)
        return answer

    def encode(self, instances: int) -> list[bytes]:
        """The messages to all instances."""
        encoder = msgspec.msgpack.Encoder()
        encoded = [encoder.encode(self.plain)] * instances
        for instance, answer in self.items():
            answer.admit_before = self.plain.admit_before
            answer.drain, answer.stop = self.plain.drain, self.plain.stop
            encoded[instance] = encoder.encode(answer)
        return encoded


class GManager:
    """Owner of the debt ledger, of every row's whereabouts and of the plan of each round. Pure:
    it sees reports and makes answers; the engine carries both.

    A promise goes, in this order, to debtors that are short, oldest request first; to transfers
    that pay; and back to its own instance, to bring its rBlocks home.

    Progress of the oldest request is guaranteed here. A request that can't go on although all
    younger ones at its home gave way reports itself starved; then nobody younger is admitted
    anywhere, any promise will do, and if the promises don't suffice, the youngest requests of the
    cluster are preempted, those with rBlocks at the starved request's home first and those nearby
    before others, until the rBlocks it wants are free. Every request fits in the whole cluster, so
    this ends with its finish at the latest when it is alone.

    A run ends early when any rank wants it to: from then on nothing new is begun anywhere, and the
    run is over as soon as nothing runs, or when a rank's time is up.
    """

    def __init__(
        self,
        requests: Iterator[Request | None],
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
        """`requests`: see `Assignment`; `links`: of the instances; `block_size`, `move_budget` (KV
        tokens per step), `attention_tokens` and `prefix_caching` as the engines';
        `exchange_seconds`: (link class, query rows) → what exchanges over such a link add to a
        step."""
        self.ledger = DebtLedger(instances)
        affinity = Affinity(block_size) if prefix_caching and policy.queue else None
        self.assignment = Assignment(requests, instances, policy.queue, attention_tokens, affinity)
        self._large_rows = LargeRows(self.assignment, links, block_size)
        self.counters = [Counters() for _ in range(instances)]
        self.reports: Reports | None = None
        """Of the last round."""
        self.running = self.free = self.capacity = 0
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
        self._patience = 0

    def round(
        self, messages: Sequence[bytes], *, drain: bool = False, halt: bool = False
    ) -> tuple[list[bytes], list[Result]]:
        """One control round: the encoded reports of all instances by instance → an encoded answer
        for each, and the results they carried. `drain` and `halt`, as in reports, come from ranks
        that send none. Raises ReportError, and does nothing, for messages that no healthy instance
        sends."""
        reports = Reports(messages)
        reports.check(self.round_number)
        self._check_rows(reports)
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
        self._serve_needs(reports, starved, promised, answers)
        if starved is not None:
            plain.admit_before = int(reports["wanted_for"][starved])
            self._call_victims(reports, starved, answers)
        elif self._planner:
            self._transfer(reports, promised, answers)
        if not self.draining:
            self._assign(reports, answers)
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

    def _assign(self, reports: Reports, answers: Answers) -> None:
        if self._policy.planner:
            self.assignment.large_from = self._block_size * int(reports["capacity"].max())
        step_tokens = _step_tokens(reports)
        given = self.assignment.assign(
            reports["room_rows"],
            reports["room_tokens"],
            reports["work_left"],
            step_tokens,
        )
        for instance, rows in given.items():
            answers[instance].assign = rows
        for home, row in self._large_rows.begin(
            reports, partial(self._reach, reports), step_tokens
        ):
            if row.request not in self.assignment.home:
                request = self.assignment.give_large(row.request, home)
                answers[home].assign = [*answers[home].assign, request]
            answers[home].begin = [*answers[home].begin, row.request]
        if self._policy.queue and not self.assignment.waiting:
            self._spread_tail(reports, given, answers)

    def _check_rows(self, reports: Reports) -> None:
        gone: set[int] = set()
        for instance, changes in reports.changes.items():
            for row in changes.large:
                if self.assignment.home.get(row.request) != instance:
                    raise ReportError(
                        f"instance {instance} reports request {row.request}, which is not there"
                    )
            rows = [result.id for result in changes.results]
            rows += [request.id for request in changes.returned]
            for request in (*changes.adopted, *rows):
                home = self.assignment.home.get(request)
                if home is None or request in gone:
                    raise ReportError(
                        f"instance {instance} reports request {request}, which nobody has to answer"
                    )
                if home != instance and not self._policy.migrate:
                    raise ReportError(
                        f"instance {instance} reports request {request}, which is at {home}"
                    )
            gone.update(rows)
            if len(set(rows)) < len(rows):
                raise ReportError(f"instance {instance} reports a request twice")

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
        self.free = int(reports["free"].sum())
        self.capacity = int(reports["capacity"].sum())
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
        self, reports: Reports, starved: int | None, promised: Blocks, answers: Answers
    ) -> None:
        """Grants for those that are short, oldest request first."""
        needs = [
            Need(
                int(reports["wanted_for"][i]),
                i,
                self._need(reports, i),
                ANYWHERE if i == starved else self._own_reach(reports, i),
                1 if self._policy.migrate else CANDIDATES,
            )
            for i in np.flatnonzero(reports["wanted"]).tolist()
        ]
        if not needs:
            return
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

    def _own_reach(self, reports: Reports, debtor: int) -> int:
        return self._reach(reports, debtor, int(reports["largest"][debtor]))

    def _reach(self, reports: Reports, debtor: int, largest: int) -> int:
        """How far the debtor's rBlocks may go: over links on which the queries of a prompt take no
        longer than computing it, if there is room enough for a request of `largest` rBlocks in all;
        over any otherwise. A row had better wait for room nearby than have all its prompt's queries
        cross a slow network."""
        if not self._policy.lending:
            return ANYWHERE
        classes = self._links.classes(debtor)
        others = np.flatnonzero(np.bincount(np.delete(classes, debtor))).tolist()
        fast = others[:1]
        if len(others) > 1 and (known := reports["prompt_time"] > 0).any():
            limit = PROMPT_ROWS * float(reports["prompt_time"][known].mean())
            fast += [c for c in others[1:] if self._exchange_seconds(c, PROMPT_ROWS) <= limit]
        reach = max(fast, default=ANYWHERE)
        room = int(reports["capacity"][classes <= reach].sum())
        return reach if room > ROOMY * largest else ANYWHERE

    def _need(self, reports: Reports, instance: int) -> int:
        """A request that migrates needs room for all of itself."""
        wanted = int(reports["wanted"][instance])
        return wanted + int(reports["longest"][instance]) if self._policy.migrate else wanted

    def _enter(self, grant: Grant, answers: Answers) -> None:
        lend = answers[grant.creditor].lend
        lend[grant.debtor] = lend.get(grant.debtor, 0) + grant.blocks
        answers[grant.debtor].granted += grant.blocks

    def _transfer(self, reports: Reports, promised: Blocks, answers: Answers) -> None:
        """Go on with the transfers that pay: grant what their creditors have promised, and let
        them keep free what is missing."""
        assert self._planner
        if self.round_number % PLAN_EVERY == 0 and self._move_budget:
            plan = self._planner.plan(
                reports,
                self.ledger,
                self.assignment.waiting,
                partial(self._own_reach, reports),
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

    def _call_victims(self, reports: Reports, starved: int, answers: Answers) -> None:
        """Let younger requests give way until the starved one has what it wants: first those that
        have rBlocks at its home, then the youngest."""
        missing = int(reports["wanted"][starved]) - answers[starved].granted
        if missing <= 0 or self.round_number < self._patience:
            return
        self._patience = self.round_number + PATIENCE
        oldest, youngest = int(reports["wanted_for"][starved]), reports["youngest"]
        near = self._links.classes(starved) <= self._own_reach(reports, starved)
        order = [int(i) for i in np.argsort(-youngest) if youngest[i] > oldest]
        order.sort(key=lambda i: not (near[i] or any(near[c] for c in self.ledger.creditors_of(i))))
        guests = self.ledger.debtors_of(starved)
        for instance in [i for i in order if i in guests]:
            blocks = min(missing, guests[instance])
            if blocks > 0:
                answers[instance].give_way, answers[instance].give_way_at = blocks, starved
                missing -= blocks
        for instance in [i for i in order if not answers[i].give_way]:
            if missing <= 0:
                break
            answers[instance].give_way = min(missing, int(reports["youngest_blocks"][instance]))
            missing -= answers[instance].give_way
        log.debug("request %d is starved: others give way", oldest)


def _step_tokens(reports: Reports) -> float:
    """Prompt tokens that could be computed in the time of a decode step, in the mean over what
    runs."""
    known = (reports["prompt_time"] > 0) & (reports["running"] > 0) & (reports["fixed"] > 0)
    if not known.any():
        return STEP_TOKENS
    steps = reports["fixed"] + reports["per_token"] * reports["running"]
    steps = steps + reports["per_kv"] * reports["kv_tokens"]
    return float(steps[known].mean() / reports["prompt_time"][known].mean())
