"""What an instance borrows, and what it owes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_distkv.ids import InstanceId, RequestId, TableKey
from hpc_distkv.memory.books.slots import FreeSlots
from hpc_distkv.memory.loan import Copied, Debt, Dropped, Move, MoveKind, News, Split
from hpc_distkv.memory.prefix import Prefix
from hpc_distkv.memory.table import BlockTable


class Borrower:
    """Owner of what an instance owes, and of what its creditors have copies of: the part of its
    RManager that faces its creditors. Ends are told to them by the next header (`settle`)."""

    def __init__(self, slots: FreeSlots, tables: Mapping[TableKey, BlockTable]) -> None:
        self.debts: dict[InstanceId, Debt] = {}
        """By creditor."""
        self.copies: dict[TableKey, Copied] = {}
        """Migrating request → what its next home has of it."""
        self.outgoing: list[Move] = []
        """rBlocks on their way to creditors."""
        self.incoming: list[Move] = []
        """rBlocks on their way home."""
        self._slots, self._tables = slots, tables

    # -- credit ---------------------------------------------------------------------------------

    @property
    def credit(self) -> int:
        """Unused credit with all creditors."""
        return sum(debt.credit for debt in self.debts.values())

    @property
    def borrowed(self) -> int:
        """rBlocks hosted for this instance elsewhere."""
        return sum(debt.used for debt in self.debts.values())

    def credit_opened(self, creditor: InstanceId, blocks: int) -> None:
        """`creditor` has reserved `blocks` slots for this instance."""
        if blocks:
            self.debts.setdefault(creditor, Debt()).credit += blocks

    def return_credit(self, creditor: InstanceId, blocks: int) -> None:
        """Give up `blocks` of unused credit; the next header tells the creditor."""
        debt = self.debts[creditor]
        assert 0 <= blocks <= debt.credit
        debt.credit -= blocks
        debt.returned += blocks

    # -- moves ----------------------------------------------------------------------------------

    def move_out(self, key: TableKey, index: int, creditor: InstanceId) -> Move:
        """Begin to move a sealed rBlock of a request or prefix to a creditor with credit."""
        table = self._tables[key]
        return self._send(Move(key, index, table.slots[table.place(index)], creditor))

    def copy_out(self, request: RequestId, creditor: InstanceId) -> Move:
        """Begin to copy the next rBlock of a request that is all at home."""
        copies = self.copies.setdefault(request, Copied(creditor))
        assert copies.creditor == creditor
        slot = self._tables[request].slots[copies.blocks]
        copies.blocks += 1
        return self._send(Move(request, copies.blocks - 1, slot, creditor, MoveKind.COPY))

    def bring_home(self, key: TableKey, index: int, creditor: InstanceId) -> Move:
        """Begin to bring an rBlock back from its creditor; there must be a usable slot."""
        assert self._slots.usable > 0
        move = Move(key, index, self._slots.take(), creditor, MoveKind.RECALL)
        self.incoming.append(move)
        return move

    def commit(self, outgoing: Iterable[Move], incoming: Iterable[Move]) -> None:
        """These moves have arrived: from now on they are served where they went."""
        for move in outgoing:
            self.outgoing.remove(move)
            if move.kind is MoveKind.LEND:
                table = self._tables[move.key]
                self._slots.release((table.to_creditor(move.block, move.peer),))
        for move in incoming:
            self.incoming.remove(move)
            self._tables[move.key].to_home(move.block, move.peer, move.slot)
            self._pay(move.peer, 1)

    def moves(self, key: TableKey) -> bool:
        """True if rBlocks of a request or prefix are on their way to creditors or home."""
        return key in [move.key for move in (*self.outgoing, *self.incoming)]

    def _send(self, move: Move) -> Move:
        """Use credit for a move."""
        debt = self.debts[move.peer]
        assert debt.credit > 0
        debt.credit -= 1
        debt.used += 1
        self.outgoing.append(move)
        return move

    # -- ends -----------------------------------------------------------------------------------

    def release(self, key: TableKey, table: BlockTable) -> None:
        """The creditors of a request or prefix that ended are to free their guests."""
        copies = self.copies.pop(key, None)
        for creditor, debt in self.debts.items():
            blocks = debt.dropped.pop(key, Dropped(0, 0)).blocks
            blocks += len(table.remote.get(creditor, ()))
            if copies and copies.creditor == creditor:
                blocks += copies.blocks
            if blocks:
                debt.released[key] = blocks

    def drop(self, request: RequestId, part: BlockTable, first: int) -> None:
        """The creditors of `part`, the rBlocks of a request before logical rBlock `first`, are to
        free it."""
        for creditor, hosted in part.remote.items():
            dropped = self.debts[creditor].dropped
            before = dropped[request].blocks if request in dropped else 0
            dropped[request] = Dropped(first, before + len(hosted))

    def split(self, prefix: Prefix, new: Prefix) -> None:
        """The creditors of `new`, which was the first part of `prefix`, are to split their
        guests."""
        for creditor in new.remote:
            self.debts[creditor].splits.append(Split(prefix.id, prefix.start, new.id))

    def hand_over(self, request: RequestId) -> None:
        """A request of which every rBlock was copied belongs to the creditor from now on."""
        copies = self.copies.pop(request)
        self._pay(copies.creditor, copies.blocks)

    def settle(self, creditor: InstanceId) -> News:
        """What the header to `creditor` tells of what this instance owes it. What ended stops
        counting as debt."""
        debt = self.debts.get(creditor)
        if debt is None:
            return News()
        news = debt.settle()
        self._pay(creditor, 0)
        return news

    def _pay(self, creditor: InstanceId, blocks: int) -> None:
        """The creditor hosts `blocks` fewer; a debt of which nothing is left is forgotten."""
        debt = self.debts[creditor]
        debt.used -= blocks
        if not debt.total:
            del self.debts[creditor]
