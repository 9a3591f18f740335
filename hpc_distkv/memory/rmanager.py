"""Who holds which rBlock of one instance: its own requests, and its guests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hpc_distkv.memory.integrity import check_loans, check_prefixes, check_slots
from hpc_distkv.memory.loan import (
    Copies,
    Debt,
    Dropped,
    Guest,
    Kind,
    Loan,
    Move,
    ProtocolError,
    Split,
)
from hpc_distkv.memory.prefix import Prefix, PrefixTree
from hpc_distkv.memory.table import BlockTable


class RManager:
    """Owner of one instance's slots, block tables, guests, debts and loans. Pure bookkeeping: it
    never sees a byte of KV, a message or a clock.

    A loan's life, with the one who writes each line in brackets:
        promise [creditor] → settle a grant [gManager's answer] → open_credit [mail to debtor]
        → move_out [debtor] / host [creditor, from the header] → bytes travel → commit [both]
        → bring_home [debtor] / give_back [creditor, from the header] → bytes travel → commit
        or close [debtor] → released, evict [header to creditor]
    A migration is a loan of copies (`copy_out`) that ends with hand_over [debtor] / adopt
    [creditor, from the header].
    Every slot is free, in one block table, in one guest, or receiving; `check` proves it. Requests
    share sealed rBlocks through the tables of prefixes (`PrefixTree`); those that nobody uses are
    given up when their slots are wanted, so they count as free.
    `bounce` slots beyond the pool take in what comes home while all else is taken: so the
    instances of a circle of debts can all bring rBlocks home at once.
    """

    def __init__(
        self, instance: int, num_blocks: int, lend_cap: int | None = None, bounce: int = 0
    ) -> None:
        self.instance = instance
        self.num_blocks = num_blocks
        self.lend_cap = num_blocks if lend_cap is None else lend_cap
        self.bounce = bounce
        self.promised = 0
        self.tables: dict[int, BlockTable] = {}
        """By request, and by prefix."""
        self.prefixes = PrefixTree(self.tables)
        self.guests: dict[tuple[int, int], Guest] = {}
        self.debts: dict[int, Debt] = {}
        self.loans: dict[int, Loan] = {}
        self.outgoing: list[Move] = []
        """Under way, like `incoming`."""
        self.incoming: list[Move] = []
        self.copies: dict[int, Copies] = {}
        """Migrating request → what its next home has of it."""
        self._free = list(range(num_blocks + bounce - 1, -1, -1))

    # -- capacity -------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots that hold nothing in use, whatever they are set aside for."""
        return max(0, self._vacant - self.bounce)

    @property
    def usable(self) -> int:
        """Slots this instance may fill itself: free, not promised, not set aside for a debtor.
        Negative while the bounce slots are in use."""
        return self._vacant - self.bounce - self.promised - self._set_aside

    @property
    def credit(self) -> int:
        """Unused credit with all creditors."""
        return sum(debt.credit for debt in self.debts.values())

    @property
    def lent(self) -> int:
        """rBlocks lent or set aside for debtors."""
        return sum(loan.total for loan in self.loans.values())

    @property
    def borrowed(self) -> int:
        """rBlocks hosted for this instance elsewhere."""
        return sum(debt.used for debt in self.debts.values())

    @property
    def held(self) -> int:
        """rBlocks of this instance's requests, wherever they are."""
        hosted = sum(loan.used for loan in self.loans.values())
        return self.num_blocks + self.bounce - self._vacant - hosted + self.borrowed

    @property
    def _vacant(self) -> int:
        return len(self._free) + self.prefixes.idle

    @property
    def _set_aside(self) -> int:
        return sum(loan.unopened + loan.credit for loan in self.loans.values())

    # -- own requests ---------------------------------------------------------------------------

    def open(self, request: int, keys: Sequence[bytes] = ()) -> BlockTable:
        """Begin the block table of a request, empty, that continues what is here of its prompt.
        `keys`: of the rBlocks of the prompt that may be shared."""
        assert request not in self.tables
        found = self.prefixes.find(keys, max(0, self.usable)) if keys else None
        prefix = self._end_at(*found) if found else None
        self.prefixes.join(request, prefix, keys)
        table = self.tables[request] = BlockTable(start=prefix.blocks if prefix else 0)
        return table

    def seal(self, request: int, blocks: int) -> None:
        """The first `blocks` rBlocks of a request are full: others may share its prompt's."""
        self.prefixes.seal(request, blocks)

    def grow(self, request: int, blocks: int) -> None:
        """Append `blocks` home rBlocks to a table. The caller has looked at `usable`."""
        assert 0 <= blocks <= max(0, self.usable)
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
        for creditor, hosted in part.remote.items():
            dropped = self.debts[creditor].dropped
            before = dropped[request].blocks if request in dropped else 0
            dropped[request] = Dropped(first, before + len(hosted))

    # -- as a creditor --------------------------------------------------------------------------

    def promise(self, blocks: int) -> int:
        """Set up to `blocks` aside until `settle`; returns how many."""
        assert not self.promised
        self.promised = max(0, min(blocks, self.usable, self.lend_cap - self.lent))
        return self.promised

    def settle(self, grants: Mapping[int, int]) -> list[int]:
        """End the promise; what of it was granted stays set aside for its debtor. Returns the
        debtors whose grant went beyond the promise and was refused."""
        left, self.promised = self.promised, 0
        refused = []
        for debtor, blocks in grants.items():
            if blocks > left or blocks < 0 or debtor == self.instance:
                refused.append(debtor)
                continue
            left -= blocks
            self.loans.setdefault(debtor, Loan()).unopened += blocks
        return refused

    def open_credit(self, debtor: int) -> int:
        """The grants that `debtor` is told of now."""
        loan = self.loans.get(debtor)
        if loan is None:
            return 0
        opened, loan.unopened = loan.unopened, 0
        loan.credit += opened
        return opened

    def take_back(self, debtor: int, blocks: int) -> None:
        """`debtor` returns unused credit."""
        if not blocks:
            return
        loan = self.loans.get(debtor, Loan())
        if not 0 < blocks <= loan.credit:
            raise ProtocolError(
                f"instance {debtor} returned {blocks} rBlocks of credit to instance "
                f"{self.instance}, which had set aside {loan.credit} for it"
            )
        loan.credit -= blocks
        self._forget_loan(debtor)

    def host(self, debtor: int, moves: Iterable[tuple[int, int]]) -> list[Move]:
        """Reserve a slot for each (request, logical index) that `debtor` announces."""
        accepted = []
        for request, index in moves:
            loan = self.loans.get(debtor, Loan())
            if loan.credit < 1:
                raise ProtocolError(
                    f"instance {debtor} sent instance {self.instance} an rBlock of request "
                    f"{request} without credit"
                )
            loan.credit -= 1
            loan.used += 1
            accepted.append(Move(request, index, self._take(), debtor))
        self.incoming.extend(accepted)
        return accepted

    def give_back(self, debtor: int, recalls: Iterable[tuple[int, int]]) -> list[Move]:
        """Begin to return the rBlocks (request, logical index) that `debtor` calls home."""
        accepted = []
        for request, index in recalls:
            guest = self.guests.get((debtor, request), Guest())
            if index not in guest.indices:
                raise ProtocolError(
                    f"instance {debtor} calls home rBlock {index} of request {request}, which "
                    f"instance {self.instance} does not host"
                )
            slot = guest.slots[guest.indices.index(index)]
            accepted.append(Move(request, index, slot, debtor, Kind.RECALL))
        self.outgoing.extend(accepted)
        return accepted

    def split_guests(self, debtor: int, splits: Iterable[Split]) -> None:
        """Split the guests of `debtor`'s prefixes as it has split these."""
        for prefix, first, new in splits:
            guest = self.guests.get((debtor, prefix), Guest())
            part = guest.cut(first)
            if not part.slots or (debtor, new) in self.guests:
                raise ProtocolError(
                    f"instance {debtor} split prefix {prefix} at rBlock {first}, of which instance "
                    f"{self.instance} hosts none before"
                )
            self.guests[debtor, new] = part
            if not guest.slots:
                del self.guests[debtor, prefix]

    def evict(self, debtor: int, requests: Iterable[int]) -> None:
        """Free the guests of `debtor`'s requests that ended."""
        for request in requests:
            self._free.extend(self._pop_guest(debtor, request).slots)

    def evict_dropped(self, debtor: int, dropped: Iterable[tuple[int, int]]) -> None:
        """Free what `debtor` has dropped of its requests: (request, first logical rBlock kept)."""
        for request, first in dropped:
            guest = self.guests.get((debtor, request), Guest())
            left = guest.cut(first).slots
            if not left:
                raise ProtocolError(
                    f"instance {debtor} dropped rBlocks before {first} of request {request}, of "
                    f"which instance {self.instance} hosts none"
                )
            self._free.extend(left)
            if not guest.slots:
                del self.guests[debtor, request]
            self.loans[debtor].used -= len(left)
            self._forget_loan(debtor)

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
        """Begin to bring an rBlock back from its creditor; there must be a free slot, if need be a
        bounce slot."""
        assert self.usable + self.bounce > 0
        move = Move(request, index, self._take(), creditor, Kind.RECALL)
        self.incoming.append(move)
        return move

    def copy_out(self, request: int, creditor: int) -> Move:
        """Begin to copy the next rBlock of a request that is all at home."""
        copies = self.copies.setdefault(request, Copies(creditor))
        assert copies.creditor == creditor
        slot = self.tables[request].slots[copies.blocks]
        copies.blocks += 1
        return self._send(Move(request, copies.blocks - 1, slot, creditor, Kind.COPY))

    def hand_over(self, request: int) -> None:
        """A request of which every rBlock was copied belongs to the creditor from now on."""
        table, copies = self.tables.pop(request), self.copies.pop(request)
        assert copies.blocks == len(table.slots) == table.blocks
        self._free.extend(table.slots)
        self.debts[copies.creditor].used -= copies.blocks
        self._forget_debt(copies.creditor)

    def settle_debt(self, creditor: int) -> tuple[list[int], int]:
        """What the header to `creditor` tells: requests that ended, credit returned. Both stop
        counting as debt."""
        debt = self.debts.get(creditor)
        if debt is None:
            return [], 0
        released, returned = debt.released, debt.returned
        debt.released, debt.returned = {}, 0
        debt.used -= sum(released.values())
        self._forget_debt(creditor)
        return list(released), returned

    def settle_dropped(self, creditor: int) -> list[tuple[int, int]]:
        """What the header to `creditor` tells beside: (request, first rBlock kept) of those that
        dropped some. What they dropped stops counting as debt."""
        debt = self.debts.get(creditor)
        if debt is None:
            return []
        dropped, debt.dropped = debt.dropped, {}
        debt.used -= sum(left.blocks for left in dropped.values())
        self._forget_debt(creditor)
        return [(request, left.first) for request, left in dropped.items()]

    def settle_splits(self, creditor: int) -> list[Split]:
        """What the header to `creditor` tells beside: prefixes that it hosts and that were split."""
        debt = self.debts.get(creditor)
        if debt is None:
            return []
        splits, debt.splits = debt.splits, []
        return splits

    # -- both -----------------------------------------------------------------------------------

    def commit(self, outgoing: Iterable[Move], incoming: Iterable[Move]) -> None:
        """These moves have arrived: from now on they are served where they went."""
        for move in outgoing:
            self.outgoing.remove(move)
            if move.kind is Kind.LEND:
                self._free.append(self.tables[move.request].to_creditor(move.block, move.peer))
            elif move.kind is Kind.RECALL:
                self._take_from_guest(move)
        for move in incoming:
            self.incoming.remove(move)
            if move.kind is Kind.RECALL:
                self.tables[move.request].to_home(move.block, move.peer, move.slot)
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

    def _take(self) -> int:
        """A slot for something new. The caller has seen that there is one."""
        return self._free.pop() if self._free else self.prefixes.evict()

    def _end_at(self, prefix: Prefix, length: int) -> Prefix:
        """The prefix whose last rBlock is the `length`th of the prompt: `prefix`, or a part of it."""
        if length == prefix.blocks:
            return prefix
        new = self.prefixes.split(prefix, length)
        for creditor in new.remote:
            self.debts[creditor].splits.append(Split(prefix.id, length, new.id))
        return new

    def _moves(self, request: int) -> bool:
        """Whether rBlocks of a request or prefix of this instance are on their way."""
        return any(m.request == request and m.kind is not Kind.RECALL for m in self.outgoing) or any(
            m.request == request and m.kind is Kind.RECALL for m in self.incoming
        )

    def _release(self, request: int, table: BlockTable) -> None:
        assert not self._moves(request)
        self._free.extend(table.slots)
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

    def _pop_guest(self, debtor: int, request: int) -> Guest:
        guest = self.guests.pop((debtor, request), None)
        if guest is None:
            raise ProtocolError(
                f"instance {debtor} released request {request}, of which instance "
                f"{self.instance} hosts nothing"
            )
        self.loans[debtor].used -= len(guest.slots)
        self._forget_loan(debtor)
        return guest

    def _take_from_guest(self, move: Move) -> None:
        key = (move.peer, move.request)
        guest = self.guests[key]
        at = guest.indices.index(move.block)
        del guest.indices[at]
        self._free.append(guest.slots.pop(at))
        if not guest.slots:
            del self.guests[key]
        self.loans[move.peer].used -= 1
        self._forget_loan(move.peer)

    def _forget_loan(self, debtor: int) -> None:
        if not self.loans[debtor].total:
            del self.loans[debtor]

    def _forget_debt(self, creditor: int) -> None:
        if not self.debts[creditor].total:
            del self.debts[creditor]
