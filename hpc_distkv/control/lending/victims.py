"""Which requests are preempted for one that is starved."""

from __future__ import annotations

import logging

import numpy as np

from hpc_distkv.control.round import Round

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
                answer.preempt, answer.preempt_at = blocks, starved
                missing -= blocks
        for instance in [i for i in order if not round.answer(i).preempt]:
            if missing <= 0:
                break
            blocks = min(missing, int(reports.youngest_blocks[instance]))
            round.answer(instance).preempt = blocks
            missing -= blocks
        log.debug("request %d is starved: others are preempted", oldest)
