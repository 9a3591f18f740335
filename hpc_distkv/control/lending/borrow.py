"""Which creditor lends to which debtor: greedy proactive borrowing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.lending.links import ANYWHERE, Classes
from hpc_distkv.control.round import Round

CANDIDATES = 3
"""Creditors one debtor may be sent to in one round (DistKV-LLM)."""


class Need(NamedTuple):
    """What a debtor wants to borrow."""

    request: int
    """The oldest request that wants the rBlocks: its age decides who is served first."""
    debtor: int
    blocks: int
    reach: int = ANYWHERE
    """The highest link class of a creditor that will do."""
    creditors: int = CANDIDATES
    """Most that may share in it."""


def greedy_borrow(needs: Sequence[Need], round: Round) -> None:
    """Serve `needs` oldest first out of what the round's instances have promised.

    Out of all creditors a debtor gets those first that close no circle of debts, then those behind
    the cheapest links, then those with most rBlocks left.
    """
    promised = round.promised
    left = int(promised.sum())
    for _, debtor, wanted, reach, creditors in sorted(needs):
        if left == 0:
            break
        classes = round.links.classes(debtor)
        able = np.flatnonzero((promised > 0) & (classes <= reach))
        able = able[able != debtor]
        ranks = _ranks(able, classes, promised, round.ledger.owing(debtor))
        for _ in range(min(creditors, len(able))):
            if wanted == 0:
                break
            best = ranks.argmin()
            creditor, ranks[best] = int(able[best]), _TAKEN
            blocks = min(wanted, int(promised[creditor]))
            wanted -= blocks
            left -= blocks
            round.grant(debtor, creditor, blocks)


# A rank is one integer: circle, link class, rBlocks, from the highest bits to the lowest.
_CLOSES_CIRCLE = 1 << 56
_CLASS_BIT = 48
_TAKEN = np.iinfo(np.int64).max


def _ranks(
    able: NDArray[np.int64], classes: Classes, promised: NDArray[np.int64], owing: set[int]
) -> NDArray[np.int64]:
    """The order in which the instances `able` lend, lowest first: int64 [able]. `owing`: those that
    cannot without a circle."""
    closes = np.zeros(len(promised), dtype=np.int64)
    closes[list(owing)] = _CLOSES_CIRCLE
    ranks: NDArray[np.int64] = (
        closes[able] + (classes[able].astype(np.int64) << _CLASS_BIT) - promised[able]
    )
    return ranks
