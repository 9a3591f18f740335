"""The records of a loan: what one instance owes another, hosts for it, and has under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from hpc_distkv.errors import FaultError
from hpc_distkv.ids import InstanceId, PrefixId, TableKey


class ProtocolError(FaultError):
    """A partner did what it may not do; continuing would corrupt somebody's KV cache."""


class Dropped(NamedTuple):
    """The rBlocks of one request that its queries have left behind."""

    first: int
    """Logical index of the first that is kept."""
    blocks: int


class Split(NamedTuple):
    """A prefix whose first part became a prefix of its own."""

    prefix: PrefixId
    first: int
    """Logical index of the first rBlock that it keeps."""
    new: PrefixId
    """The prefix that has the rBlocks before that one."""


class News(NamedTuple):
    """What a header (`control.messages.loans`) tells a creditor of its guests and credit."""

    released: Sequence[TableKey] = ()
    returned: int = 0
    dropped: Sequence[tuple[TableKey, int]] = ()
    splits: Sequence[Split] = ()


@dataclass
class Debt:
    """What this instance owes one creditor, in rBlocks."""

    credit: int = 0
    """Opened by the creditor and not used yet."""
    used: int = 0
    """Hosted by the creditor, or on their way to it."""
    returned: int = 0
    """Credit given up of which the creditor has not been told."""
    released: dict[TableKey, int] = field(default_factory=dict)
    """Requests and prefixes that ended → their rBlocks that the creditor has not been told to
    free."""
    dropped: dict[TableKey, Dropped] = field(default_factory=dict)
    """Requests that go on → what the creditor has not been told to free of them."""
    splits: list[Split] = field(default_factory=list)
    """What the creditor has not been told to split."""

    @property
    def total(self) -> int:
        """All that the creditor reserves or hosts for this instance, as far as known."""
        return self.credit + self.used + self.returned

    @property
    def news(self) -> bool:
        """True if the next header has to tell the creditor something."""
        return bool(self.released or self.dropped or self.returned or self.splits)

    def settle(self) -> News:
        """Take the news for the next header. What it frees stops counting as debt."""
        dropped = [(request, left.first) for request, left in self.dropped.items()]
        news = News(list(self.released), self.returned, dropped, self.splits)
        self.used -= sum(self.released.values()) + sum(d.blocks for d in self.dropped.values())
        self.released, self.dropped, self.returned, self.splits = {}, {}, 0, []
        return news


@dataclass
class Loan:
    """What this instance lends one debtor, in rBlocks."""

    unopened: int = 0
    """Granted by the gManager; the debtor has not been told."""
    credit: int = 0
    """Reserved for the debtor, which knows it."""
    used: int = 0
    """Hosted for the debtor, or on their way here."""

    @property
    def total(self) -> int:
        """All that is reserved for the debtor or used by it."""
        return self.unopened + self.credit + self.used


@dataclass
class Guest:
    """The rBlocks hosted for one block table of one debtor, in the order of their arrival."""

    slots: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """Logical index of each slot in the debtor's block table."""

    def cut(self, first: int) -> Guest:
        """Take out the rBlocks before logical rBlock `first`, as a guest of their own."""
        pairs = list(zip(self.slots, self.indices, strict=True))
        early = [pair for pair in pairs if pair[1] < first]
        late = [pair for pair in pairs if pair[1] >= first]
        self.slots, self.indices = [slot for slot, _ in late], [index for _, index in late]
        return Guest([slot for slot, _ in early], [index for _, index in early])


class MoveKind(Enum):
    """What a move does when it is committed."""

    LEND = "lend"
    """The creditor hosts the rBlock, its home slot is free."""
    RECALL = "recall"
    """The rBlock is at home again, the creditor's slot is free."""
    COPY = "copy"
    """The creditor has the rBlock too, and owns it when the request is handed over."""


class Move(NamedTuple):
    """An rBlock on its way between a debtor and a creditor. Until `commit` it is served from where
    it was."""

    key: TableKey
    """Request or prefix."""
    block: int
    """Logical index."""
    slot: int
    """This instance's slot: the one it leaves on the sender's side, the receiving one on the
    other."""
    peer: InstanceId
    kind: MoveKind = MoveKind.LEND


@dataclass
class Copied:
    """A request's rBlocks that an instance has copies of, in logical order from the first."""

    creditor: InstanceId
    blocks: int = 0
