"""How long the host's memory keeps a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.simulate.cost import HostRates, Rates
from hpc_distkv.step.sizes import BUFFERS, PIECE_BLOCKS, QUERY_ROWS


class HostQueries(NamedTuple):
    """Queries of a step to the same rBlocks in the host's memory."""

    rows: int
    """Query rows."""
    tokens: int
    """KV tokens of those rBlocks."""


class HostTime(NamedTuple):
    """Seconds of one step."""

    before: float = 0.0
    """Copies that its layers wait for."""
    attending: float = 0.0
    """By which attention to what is in the host's memory makes its layers longer."""
    beside: float = 0.0
    """Copies beside its layers: it ends no sooner."""


class HostCost:
    """Seconds of what `step.host_tier.HostTier` does for an instance.

    On a rank with a device rBlocks move beside what that computes, and the host's processor
    attends to legs of few query rows beside the device's own attention: only what takes longer
    shows. Legs of many rows are staged, through the same queue as moves: pieces for both buffers
    arrive while the layers compute the rest, the others one behind the other while the device
    attends to them. All count as if they came behind the moves, though the first two come before.
    On a rank that computes on the host itself nothing is staged, and everything comes one after
    another.

    Not modelled: what all devices of a node together take from each other of its memory.
    """

    def __init__(self, rates: Rates, config: EngineConfig) -> None:
        """The cluster of these rates says what its hosts can do."""
        assert rates.host is not None
        self._device, self._host = rates, rates.host
        self._block_size = config.block_size
        self._staged_from = config.host_staged_from if rates.host.beside else math.inf

    def time(
        self, moves: int, legs: Sequence[HostQueries], attention: float, step: float
    ) -> HostTime:
        """A step that moves so many rBlocks to the host's memory and back. `attention`: its seconds
        of attention to what is at home; `step`: of all it computes there."""
        host = self._host
        staged = [leg for leg in legs if leg.rows >= self._staged_from]
        in_place = self._in_place([leg for leg in legs if leg.rows < self._staged_from])
        copies = host.move.fixed + moves * host.move.each if moves else 0.0
        if not host.beside:
            return HostTime(copies, in_place)
        shown = max(0.0, in_place - attention)
        if not staged:
            return HostTime(0.0, shown, copies)
        ahead = min(BUFFERS * PIECE_BLOCKS * host.move.each, step + shown)
        return HostTime(copies, shown + self._staged(staged, ahead))

    def _in_place(self, legs: Sequence[HostQueries]) -> float:
        """Reading or computing, whichever is longer, and the way of queries and results."""
        host = self._host
        rows = sum(leg.rows for leg in legs)
        exchange = host.exchange.fixed + rows * host.exchange.each if rows else 0.0
        return exchange + _attention(legs, host.kv_token, host.pair)

    def _staged(self, legs: Sequence[HostQueries], ahead: float) -> float:
        """The copies but for `ahead` seconds of them, or the device's attention: what is longer."""
        blocks = sum(leg.tokens for leg in legs) / self._block_size
        attention = _attention(legs, self._device.kv_token, self._device.pair)
        return max(attention, blocks * self._host.move.each - ahead)


def staged_from(host: HostRates, block_size: int) -> float:
    """Query rows from which rBlocks are copied to the device, as `start.host_costs` would measure
    it."""
    if not host.beside:
        return math.inf
    copy = host.move.each / block_size
    return copy / max(host.kv_token / QUERY_ROWS, host.pair)


def _attention(legs: Iterable[HostQueries], kv_token: float, pair: float) -> float:
    """KV is read once for all rows of a leg, and multiplied for each: what takes longer counts."""
    return sum(leg.tokens * max(kv_token, leg.rows * pair) for leg in legs)
