"""The gManager: from the reports of a round to its answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from hpc_distkv.control.assign import Assignment
from hpc_distkv.control.borrow import Grant, Need, greedy_borrow
from hpc_distkv.control.ledger import DebtLedger
from hpc_distkv.control.messages import NOBODY, Answer, Counters, Report, Request, Result

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.2
"""Goal for the wall time between two boundaries of instances that have loans."""
MAX_STEPS = 64
"""Most steps between two boundaries: bounds the harm of a wrong step time."""
PATIENCE = 3
"""Rounds between two calls for victims: the blocks of the last ones need that long to show."""


class GManager:
    """Owner of the debt ledger, of every row's whereabouts and of the plan of each round. Pure:
    it sees reports and makes answers; the engine carries both.

    Progress of the oldest request is guaranteed here. A request that can't go on although all
    younger ones at its home gave way reports itself starved; then nobody younger is admitted
    anywhere, and if the promises don't suffice, the youngest requests of the cluster are
    preempted, those with rBlocks at the starved request's home first, until the rBlocks it wants
    are free. Every request fits in the whole cluster, so this ends with its finish at the latest
    when it is alone.
    """

    def __init__(
        self, requests: Iterator[Request], nodes: Sequence[int], lending: bool = True
    ) -> None:
        """`nodes`: the node of every instance."""
        self.ledger = DebtLedger(len(nodes))
        self.assignment = Assignment(requests, len(nodes))
        self.counters = [Counters() for _ in nodes]
        self.running = self.free = self.capacity = 0
        self._nodes = tuple(nodes)
        self._lending = lending
        self._round = 0
        self._held: dict[int, dict[int, int]] = {}
        self._patience = 0

    def round(self, reports: Sequence[Report]) -> tuple[list[Answer], list[Result]]:
        """One control round: the reports of all instances by instance → an answer for each, and
        the results they carried."""
        self._check(reports)
        results = [result for report in reports for result in report.results]
        for result in results:
            self.assignment.finish(result)
        self._observe(reports)
        grants = self._lend(reports) if self._lending else []
        starved = min((r for r in reports if r.starved), key=lambda r: r.wanted_for, default=None)
        victims = self._victims(starved, grants) if starved else {}
        assigned = self.assignment.assign(
            [report.room_rows for report in reports], [report.room_tokens for report in reports]
        )
        steps = self._steps(reports, assigned)
        partners = self.ledger.partners()
        answers = [
            Answer(
                round=self._round,
                assign=assigned[instance],
                lend={g.debtor: g.blocks for g in grants if g.creditor == instance},
                granted=sum(g.blocks for g in grants if g.debtor == instance),
                preempt=victims.get(instance, []),
                admit_before=starved.wanted_for if starved else NOBODY,
                partners=sorted(partners[instance]),
                steps=steps[instance],
                stop=self.assignment.done,
            )
            for instance in range(len(reports))
        ]
        self._round += 1
        return answers, results

    def _check(self, reports: Sequence[Report]) -> None:
        for instance, report in enumerate(reports):
            if report.round != self._round:
                raise RuntimeError(
                    f"instance {instance} reported for round {report.round} in round {self._round}"
                )

    def _observe(self, reports: Sequence[Report]) -> None:
        for instance, report in enumerate(reports):
            self.ledger.set_row(instance, report.lent)
            self.counters[instance] = report.counters
            for request, places in report.held.items():
                if places:
                    self._held[request] = places
                else:
                    self._held.pop(request, None)
        self.running = len(self._held)
        self.free = sum(report.free for report in reports)
        self.capacity = sum(report.capacity for report in reports)

    def _lend(self, reports: Sequence[Report]) -> list[Grant]:
        needs = [
            Need(report.wanted_for, instance, report.wanted)
            for instance, report in enumerate(reports)
            if report.wanted > 0
        ]
        if not needs:
            return []
        promised = [report.promised for report in reports]
        return greedy_borrow(needs, promised, self.ledger, self._nodes)

    def _victims(self, starved: Report, grants: Sequence[Grant]) -> dict[int, list[int]]:
        """Home instance → requests that give way to the starved one."""
        home = self.assignment.home.get(starved.wanted_for)
        if home is None or not self._lending:
            return {}
        missing = starved.wanted - sum(g.blocks for g in grants if g.debtor == home)
        if missing <= 0 or self._round < self._patience:
            return {}
        self._patience = self._round + PATIENCE
        younger = [request for request in self._held if request > starved.wanted_for]
        younger.sort(key=lambda request: (home not in self._held[request], -request))
        victims: dict[int, list[int]] = {}
        for request in younger:
            if missing <= 0:
                break
            if (owner := self.assignment.home.get(request)) is not None:
                missing -= sum(self._held[request].values())
                victims.setdefault(owner, []).append(request)
        log.debug("request %d is starved: %s give way", starved.wanted_for, victims)
        return victims

    def _steps(self, reports: Sequence[Report], assigned: Sequence[Sequence[Request]]) -> list[int]:
        """Steps to the next boundary, so that a round lasts about equally long everywhere: as long
        as the slowest component needs for one step, but no shorter than the goal. New rows mean
        steps with prompts; where none was measured yet, one step is all that is foreseeable."""
        times = [
            (report.chunk_time if new else report.step_time)
            for report, new in zip(reports, assigned, strict=True)
        ]
        slowest = max(ROUND_SECONDS, *times)
        steps = [0] * len(times)
        for component in self.ledger.components():
            if len(component) > 1:
                pace = max(times[instance] for instance in component)
                known = all(times[i] or not (assigned[i]) for i in component)
                count = min(MAX_STEPS, max(1, int(slowest / pace))) if pace and known else 1
                for instance in component:
                    steps[instance] = count
        return steps
