"""Which requests are preempted for one that is starved."""

from __future__ import annotations

import logging

import numpy as np

from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.answer import Answers
from hpc_distkv.control.messages.reports import Reports

log = logging.getLogger(__name__)

PATIENCE = 3
"""Rounds between two calls for victims: the blocks of the last ones need that long to show."""


class Victims:
    """Has younger requests preempted, round by round, until a starved one has what it wants: first
    those that have rBlocks at its home and those nearby, then the youngest."""

    def __init__(self, ledger: DebtLedger, links: Links) -> None:
        self._ledger, self._links = ledger, links
        self._next_call = 0
        """The first round that may call again."""

    def call(self, reports: Reports, starved: int, reach: int, answers: Answers) -> None:
        """`starved`: the home of the request; `reach`: the highest link class of its creditors."""
        missing = int(reports["wanted"][starved]) - answers[starved].granted
        now = answers.plain.round
        if missing <= 0 or now < self._next_call:
            return
        self._next_call = now + PATIENCE
        oldest, youngest = int(reports["wanted_for"][starved]), reports["youngest"]
        near = self._links.classes(starved) <= reach
        order = [int(i) for i in np.argsort(-youngest) if youngest[i] > oldest]
        creditors_of = self._ledger.creditors_of
        order.sort(key=lambda i: not (near[i] or any(near[c] for c in creditors_of(i))))
        guests = self._ledger.debtors_of(starved)
        for instance in [i for i in order if i in guests]:
            blocks = min(missing, guests[instance])
            if blocks > 0:
                answers[instance].preempt, answers[instance].preempt_at = blocks, starved
                missing -= blocks
        for instance in [i for i in order if not answers[i].preempt]:
            if missing <= 0:
                break
            answers[instance].preempt = min(missing, int(reports["youngest_blocks"][instance]))
            missing -= answers[instance].preempt
        log.debug("request %d is starved: others are preempted", oldest)
