"""What an instance asks of others, and what it offers them."""

from __future__ import annotations

from typing import NamedTuple


class Demand(NamedTuple):
    """What a report says of memory."""

    wanted: int
    wanted_for: int
    largest: int
    """rBlocks that the largest sequence that wants any may come to need."""
    starved: bool
    lendable: int
