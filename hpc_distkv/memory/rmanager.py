"""Who holds which rBlock of one instance: its own requests, and its guests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpc_distkv.memory.books.integrity import check_host, check_loans, check_prefixes, check_slots
from hpc_distkv.memory.books.swap import SwapSpace
from hpc_distkv.memory.lender import Lender
from hpc_distkv.memory.loan import (
    HOST,
    Copies,
    Debt,
    Dropped,
    Guest,
    Move,
    MoveKind,
    News,
    ProtocolError,
    Split,
)
from hpc_distkv.memory.prefix import Prefix
from hpc_distkv.memory.table import BlockTable


class RManager(Lender):
    """Owner of one instance's block tables and debts, and as a lender of its slots, guests and
    loans. Pure bookkeeping: it never sees a byte of KV, a message or a clock.

    A loan's life, with the one who writes each line in brackets:
        promise [creditor] → settle a grant [gManager's answer] → open_credit [mail to debtor]
        → move_out [debtor] / host [creditor, from the header] → bytes travel → commit [both]
        → bring_home [debtor] / give_back [creditor, from the header] → bytes travel → commit
        or close [debtor] → released, evict [header to creditor]
    A migration is a loan of copies (`copy_out`) that ends with hand_over [debtor] / adopt
    [creditor, from the header].
    The host's memory (`SwapSpace`) is like a creditor inside the rank, without credit or messages:
        spill → bytes travel → commit → served there → bring_home → bytes travel → commit
        swap_out → bytes travel → commit, finish_swap_out → resume → bring_home …
    Every slot is free, in one block table, in one guest, or receiving; `check` proves it. Requests
    share sealed rBlocks through the tables of prefixes (`PrefixTree`); those that nobody uses are
    given up when their slots are wanted, so they count as free.
    """

    def __init__(
        self,
        instance: int,
        num_blocks: int,
        lend_cap: int | None = None,
        host_blocks: int = 0,
    ) -> None:
        super().__init__(instance, num_blocks, lend_cap)
        self.swap = SwapSpace(host_blocks)
        self.debts: dict[int, Debt] = {}
        self.copies: dict[int, Copies] = {}
        """Migrating request → what its next home has of it."""

    # -- capacity -------------------------------------------------------------------------------

    @property
    def credit(self) -> int:
        """Unused credit with all creditors."""
        return sum(debt.credit for debt in self.debts.values())

    @property
    def borrowed(self) -> int:
        """rBlocks hosted for this instance elsewhere."""
        return sum(debt.used for debt in self.debts.values())

    @property
    def held(self) -> int:
        """rBlocks of this instance's requests, wherever they are."""
        hosted = sum(loan.used for loan in self.loans.values())
        return self.num_blocks - self.free - hosted + self.borrowed

    # -- own requests ---------------------------------------------------------------------------

    def open(self, request: int, keys: Sequence[bytes] = ()) -> BlockTable:
        """Begin the block table of a request, empty, that continues what is here of its prompt.
        `keys`: of the rBlocks of the prompt that may be shared."""
        assert request not in self.tables
        found = self.prefixes.find(keys, self.usable) if keys else None
        prefix = self._end_at(*found) if found else None
        self.prefixes.join(request, prefix, keys)
        table = self.tables[request] = BlockTable(start=prefix.blocks if prefix else 0)
        return table

    def seal(self, request: int, blocks: int) -> None:
        """The first `blocks` rBlocks of a request are full: others may share its prompt's."""
        self.prefixes.seal(request, blocks)

    def grow(self, request: int, blocks: int) -> None:
        """Append `blocks` home rBlocks to a table. The caller has looked at `usable`."""
        assert 0 <= blocks <= self.usable
        table = self.tables[request]
        for _ in range(blocks):
            table.add(self._take())

    def close(self, request: int) -> None:
        """Free a request's rBlocks, but those that others share, at home now and at its creditors
        by the next header. Its moves must have been committed."""
        self._release(request, self.tables.pop(request))
        for prefix in self.prefixes.leave(request):
            self._release(prefix.id, prefix)
        copies = self.copies.pop(request, None)
        if copies and copies.blocks:
            self.debts[copies.creditor].released[request] = copies.blocks

    def parts(self, request: int) -> dict[int, BlockTable]:
        """All block tables whose rBlocks a request's queries see, the last ones first."""
        tables: dict[int, BlockTable] = {request: self.tables[request]}
        return tables | {p.id: p for p in self.prefixes.chain(request)[::-1]}

    def held_alone(self, request: int, at: int | None = None) -> int:
        """rBlocks that nobody needs when the request is gone; those at creditor `at` alone if it is
        given."""
        tables = [self.tables[request], *self.prefixes.used_alone(request)]
        return sum(t.held if at is None else len(t.remote.get(at, ())) for t in tables)

    def drop(self, request: int, first: int) -> None:
        """No query will see a request's rBlocks before logical rBlock `first` any more: free them,
        at home now and at its creditors by the next header. Its moves must have been committed."""
        assert not self._moves(request)
        part = self.tables[request].cut(first)
        self._free.extend(part.slots)
        if in_host := part.remote.pop(HOST, None):
            self.swap.give_up(request, in_host)
        for creditor, hosted in part.remote.items():
            dropped = self.debts[creditor].dropped
            before = dropped[request].blocks if request in dropped else 0
            dropped[request] = Dropped(first, before + len(hosted))

    def adopt(self, debtor: int, request: int) -> None:
        """The guest of `debtor`'s request is the block table of a request of this instance."""
        guest = self._pop_guest(debtor, request)
        if request in self.tables or sorted(guest.indices) != list(range(len(guest.indices))):
            raise ProtocolError(
                f"instance {debtor} handed over request {request}, of which instance "
                f"{self.instance} does not have every rBlock"
            )
        table = self.open(request)
        for _, slot in sorted(zip(guest.indices, guest.slots, strict=True)):
            table.add(slot)

    # -- as a debtor ----------------------------------------------------------------------------

    def credit_opened(self, creditor: int, blocks: int) -> None:
        """`creditor` has set `blocks` aside for this instance."""
        if blocks:
            self.debts.setdefault(creditor, Debt()).credit += blocks

    def return_credit(self, creditor: int, blocks: int) -> None:
        """Give up `blocks` of unused credit; the next header tells the creditor."""
        debt = self.debts[creditor]
        assert 0 <= blocks <= debt.credit
        debt.credit -= blocks
        debt.returned += blocks

    def move_out(self, request: int, index: int, creditor: int) -> Move:
        """Begin to move a sealed rBlock to a creditor with credit."""
        table = self.tables[request]
        return self._send(Move(request, index, table.slots[table.place(index)], creditor))

    def bring_home(self, request: int, index: int, creditor: int) -> Move:
        """Begin to bring an rBlock back from its creditor or the host's memory; there must be a
        free slot."""
        assert self.usable > 0
        move = Move(request, index, self._take(), creditor, MoveKind.RECALL)
        self.incoming.append(move)
        return move

    def copy_out(self, request: int, creditor: int) -> Move:
        """Begin to copy the next rBlock of a request that is all at home."""
        copies = self.copies.setdefault(request, Copies(creditor))
        assert copies.creditor == creditor
        slot = self.tables[request].slots[copies.blocks]
        copies.blocks += 1
        return self._send(Move(request, copies.blocks - 1, slot, creditor, MoveKind.COPY))

    def hand_over(self, request: int) -> None:
        """A request of which every rBlock was copied belongs to the creditor from now on."""
        table, copies = self.tables.pop(request), self.copies.pop(request)
        assert copies.blocks == len(table.slots) == table.blocks
        self._free.extend(table.slots)
        self.debts[copies.creditor].used -= copies.blocks
        self._forget_debt(copies.creditor)

    def settle_debt(self, creditor: int) -> News:
        """What the header to `creditor` tells of what this instance owes it. What ended stops
        counting as debt."""
        debt = self.debts.get(creditor)
        if debt is None:
            return News()
        news = debt.settle()
        self._forget_debt(creditor)
        return news

    # -- the host's memory ----------------------------------------------------------------------

    def spill(self, request: int, index: int) -> Move:
        """Begin to move a sealed rBlock to the host's memory, which has a free slot."""
        table = self.tables[request]
        self.swap.take(request, index)
        move = Move(request, index, table.slots[table.place(index)], HOST)
        self.outgoing.append(move)
        return move

    def can_swap_out(self, request: int, sealed: int) -> bool:
        """Whether the host's memory has room for the first `sealed` rBlocks of a request, without
        those that others use too. None of the others may be at a creditor: the request will need
        all of them when it is resumed."""
        table, alone = self.tables[request], self.prefixes.used_alone(request)
        if table.remote.keys() - {HOST} or any(prefix.remote for prefix in alone):
            return False
        blocks = sum(len(prefix.slots) for prefix in alone) + table.place(sealed)
        return request not in self.copies and 0 < blocks <= self.swap.free

    def swap_out(self, request: int, sealed: int) -> list[Move]:
        """Begin to copy these rBlocks to the host's memory. When they have arrived,
        `finish_swap_out`."""
        alone = self.prefixes.used_alone(request)[::-1]
        first = alone[0].start if alone else self.tables[request].start
        self.swap.swapped[request] = first if self.prefixes.last(request) else 0
        moves = [
            Move(request, index, slot, HOST, MoveKind.COPY)
            for part in (*alone, self.tables[request])
            for index, slot in zip(part.indices, part.slots, strict=True)
            if index < sealed
        ]
        for move in moves:
            self.swap.take(request, move.block)
        self.outgoing += moves
        return moves

    def finish_swap_out(self, request: int) -> None:
        """Close a request, but keep its rBlocks in the host's memory."""
        table = self.tables[request]
        table.remote.pop(HOST, None)
        self.close(request)

    def resume(self, request: int, keys: Sequence[bytes] = ()) -> BlockTable:
        """Open the block table of a swapped-out request: its rBlocks are in the host's memory, but
        for those of its prompt that are here (`keys` as of `open`). If the prefix that it shared is
        gone it begins anew."""
        found = self.prefixes.find(keys, self.usable) if keys else None
        length = found[1] if found else 0
        if length < self.swap.swapped[request]:
            self.swap.discard(request)
            return self.open(request, keys)
        del self.swap.swapped[request]
        prefix = self._end_at(*found) if found else None
        self.prefixes.join(request, prefix, ())
        blocks = sorted(self.swap.slots[request])
        needless = [index for index in blocks if index < length]
        if needless:
            self.swap.give_up(request, needless)
        kept = blocks[len(needless) :]
        table = self.tables[request] = BlockTable(start=kept[0] if kept else length)
        if kept:
            table.remote, table.remote_blocks = {HOST: kept}, len(kept)
        return table

    # -- both -----------------------------------------------------------------------------------

    def commit(self, outgoing: Iterable[Move], incoming: Iterable[Move]) -> None:
        """These moves have arrived: from now on they are served where they went."""
        for move in outgoing:
            self.outgoing.remove(move)
            if move.kind is MoveKind.LEND:
                self._free.append(self.tables[move.request].to_creditor(move.block, move.peer))
            elif move.kind is MoveKind.RECALL:
                self._take_from_guest(move)
        for move in incoming:
            self.incoming.remove(move)
            if move.kind is MoveKind.RECALL:
                self.tables[move.request].to_home(move.block, move.peer, move.slot)
                if move.peer == HOST:
                    self.swap.give_up(move.request, [move.block])
                    continue
                self.debts[move.peer].used -= 1
                self._forget_debt(move.peer)
            else:
                guest = self.guests.setdefault((move.peer, move.request), Guest())
                guest.slots.append(move.slot)
                guest.indices.append(move.block)

    def check(self) -> None:
        """Assert the invariants: every slot has exactly one owner, and the counts agree."""
        check_slots(self, self._free)
        check_prefixes(self)
        check_loans(self)
        check_host(self)

    def _end_at(self, prefix: Prefix, length: int) -> Prefix:
        """The prefix that ends with rBlock `length` of the prompt: `prefix`, or a part of it."""
        if length == prefix.blocks:
            return prefix
        new = self.prefixes.split(prefix, length)
        for creditor in new.remote:
            if creditor == HOST:
                self.swap.split(prefix.id, length, new.id)
            else:
                self.debts[creditor].splits.append(Split(prefix.id, length, new.id))
        return new

    def _moves(self, request: int) -> bool:
        """Whether rBlocks of a request or prefix of this instance are on their way."""
        return any(
            m.request == request and m.kind is not MoveKind.RECALL for m in self.outgoing
        ) or any(m.request == request and m.kind is MoveKind.RECALL for m in self.incoming)

    def _release(self, request: int, table: BlockTable) -> None:
        assert not self._moves(request)
        self._free.extend(table.slots)
        if HOST in table.remote:
            self.swap.give_up(request, table.remote[HOST])
        for creditor, debt in self.debts.items():
            left = debt.dropped.pop(request, Dropped(0, 0)).blocks
            if blocks := left + len(table.remote.get(creditor, ())):
                debt.released[request] = blocks

    def _send(self, move: Move) -> Move:
        """Use credit for a move."""
        debt = self.debts[move.peer]
        assert debt.credit > 0
        debt.credit -= 1
        debt.used += 1
        self.outgoing.append(move)
        return move

    def _forget_debt(self, creditor: int) -> None:
        if not self.debts[creditor].total:
            del self.debts[creditor]
