"""The mail between loan partners."""

from __future__ import annotations

import msgspec

from hpc_distkv.control.messages.requests import Request
from hpc_distkv.ids import PrefixId, TableKey


class Handover(msgspec.Struct, frozen=True, array_like=True):
    """A request that goes on at another instance. Ages are seconds before the header."""

    request: Request
    tokens: bytes
    """`pack_tokens` of prompt and output so far."""
    computed: int
    assigned_age: float
    first_token_age: float | None
    last_token_age: float | None
    logprobs: bytes = b""
    """`pack_logprobs` of the output so far."""


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """A debtor to a creditor before layer 0 of a step of the debtor, if there is anything to tell.
    Applied in this field order."""

    splits: list[tuple[PrefixId, int, PrefixId]]
    """(prefix, logical index, new prefix) of mine: the guest's rBlocks before that index are the
    new prefix's."""
    released: list[TableKey]
    """Requests and prefixes of mine that ended: free their guests."""
    dropped: list[tuple[TableKey, int]]
    """(request, logical index) of mine that go on: free their guests' rBlocks before that index."""
    returned: int
    """Credit of mine that I give back."""
    moves: list[tuple[TableKey, int]]
    """(request or prefix, logical index) of the rBlocks I send you behind this step's layers."""
    recalls: list[tuple[TableKey, int]]
    """(request or prefix, logical index) of my rBlocks with you: send them back behind this step's
    layers."""
    handovers: list[Handover]
    """Requests of mine of which you host all rBlocks after this step: they are yours from then."""
    queries: list[tuple[list[TableKey], int, int]]
    """(request or prefixes, query rows, position of the first) of mine that attend to these guests
    with you, in order of the rows."""


class Credit(msgspec.Struct, frozen=True, array_like=True, tag="credit"):
    """A creditor to a debtor."""

    blocks: int
    """rBlocks that I set aside for you."""
