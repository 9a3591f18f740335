"""Which creditor lends to which debtor: greedy proactive borrowing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hpc_distkv.control.ledger import DebtLedger

CANDIDATES = 3
"""Creditors one debtor may be sent to in one round (DistKV-LLM)."""


class Need(NamedTuple):
    """A debtor's wish."""

    request: int
    """The oldest request that wants the rBlocks: its age decides who is served first."""
    debtor: int
    blocks: int


class Grant(NamedTuple):
    """`creditor` sets `blocks` rBlocks of its promise aside for `debtor`."""

    debtor: int
    creditor: int
    blocks: int


def greedy_borrow(
    needs: Sequence[Need], promised: Sequence[int], ledger: DebtLedger, nodes: Sequence[int]
) -> list[Grant]:
    """Serve `needs` oldest first out of `promised` rBlocks per instance and enter the grants in
    `ledger`. A debtor gets at most `CANDIDATES` creditors: those that close no circle of debts
    first, then those on its own node, then those with most rBlocks left."""
    left = list(promised)
    grants = []
    for _, debtor, wanted in sorted(needs):
        ranked = sorted(
            (
                ledger.closes_circle(debtor, creditor),
                nodes[creditor] != nodes[debtor],
                -left[creditor],
                creditor,
            )
            for creditor in range(len(left))
            if creditor != debtor and left[creditor] > 0
        )
        for *_, creditor in ranked[:CANDIDATES]:
            blocks = min(wanted, left[creditor])
            if blocks < 1:
                break
            wanted -= blocks
            left[creditor] -= blocks
            ledger.grant(debtor, creditor, blocks)
            grants.append(Grant(debtor, creditor, blocks))
    return grants
