"""Who holds which rBlock of one instance: its own requests, and its guests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hpc_distkv.memory.table import BlockTable


class ProtocolError(RuntimeError):
    """A partner did what it may not do; continuing would corrupt somebody's KV cache."""


@dataclass
class Debt:
    """What this instance owes one creditor, in rBlocks."""

    credit: int = 0
    """Opened by the creditor and not used yet."""
    used: int = 0
    """Hosted by the creditor, or on their way to it."""
    returned: int = 0
    """Credit given up of which the creditor has not been told."""
    released: dict[int, int] = field(default_factory=dict)
    """Requests that ended → their rBlocks that the creditor has not been told to free."""

    @property
    def total(self) -> int:
        """Everything the creditor has set aside or hosts for this instance, as far as known."""
        return self.credit + self.used + self.returned


@dataclass
class Loan:
    """What this instance lends one debtor, in rBlocks."""

    unopened: int = 0
    """Granted by the gManager; the debtor has not been told."""
    credit: int = 0
    """Set aside for the debtor."""
    used: int = 0
    """Hosted for the debtor, or on their way here."""

    @property
    def total(self) -> int:
        """Everything set aside for or used by the debtor."""
        return self.unopened + self.credit + self.used


@dataclass
class Guest:
    """The rBlocks hosted for one request of one debtor, in the order of their arrival."""

    slots: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """Logical index of each slot in the debtor's block table."""


class Move(NamedTuple):
    """A sealed rBlock on its way from a debtor to a creditor."""

    request: int
    block: int
    """Logical index in the request's block table."""
    slot: int
    """Home slot on the debtor's side, the receiving slot on the creditor's."""
    peer: int


class RManager:
    """Owner of one instance's slots, block tables, guests, debts and loans. Pure bookkeeping: it
    never sees a byte of KV, a message or a clock.

    A loan's life, with the one who writes each line in brackets:
        promise [creditor] → settle a grant [gManager's answer] → open_credit [header to debtor]
        → move_out [debtor] / host [creditor, from the header] → bytes travel → commit [both]
        → close [debtor] → released, evict [header to creditor]
    Every slot is free, in one block table, in one guest, or receiving; `check` proves it.
    """

    def __init__(self, instance: int, num_blocks: int, lend_cap: int | None = None) -> None:
        self.instance = instance
        self.num_blocks = num_blocks
        self.lend_cap = num_blocks if lend_cap is None else lend_cap
        self.promised = 0
        self.tables: dict[int, BlockTable] = {}
        self.guests: dict[tuple[int, int], Guest] = {}
        self.debts: dict[int, Debt] = {}
        self.loans: dict[int, Loan] = {}
        self.outgoing: list[Move] = []
        self.incoming: list[Move] = []
        self._free = list(range(num_blocks - 1, -1, -1))

    # -- capacity -------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots that hold nothing, whatever they are set aside for."""
        return len(self._free)

    @property
    def usable(self) -> int:
        """Slots this instance may fill itself: free, not promised, not set aside for a debtor."""
        return self.free - self.promised - self._set_aside

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
    def _set_aside(self) -> int:
        return sum(loan.unopened + loan.credit for loan in self.loans.values())

    # -- own requests ---------------------------------------------------------------------------

    def open(self, request: int) -> BlockTable:
        """Begin an empty block table."""
        assert request not in self.tables
        table = self.tables[request] = BlockTable()
        return table

    def grow(self, request: int, blocks: int) -> None:
        """Append `blocks` home rBlocks to a table. The caller has looked at `usable`."""
        assert 0 <= blocks <= self.usable
        table = self.tables[request]
        for _ in range(blocks):
            table.add(self._free.pop())

    def close(self, request: int) -> None:
        """Free a request's rBlocks, at home now and at its creditors by the next header. Its
        moves must have been committed."""
        assert all(move.request != request for move in self.outgoing)
        table = self.tables.pop(request)
        self._free.extend(table.slots)
        for creditor, indices in table.remote.items():
            self.debts[creditor].released[request] = len(indices)

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
        """The grants to tell `debtor` of in this header."""
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
            accepted.append(Move(request, index, self._free.pop(), debtor))
        self.incoming.extend(accepted)
        return accepted

    def evict(self, debtor: int, requests: Iterable[int]) -> None:
        """Free the guests of `debtor`'s requests that ended."""
        for request in requests:
            guest = self.guests.pop((debtor, request), None)
            if guest is None:
                raise ProtocolError(
                    f"instance {debtor} released request {request}, of which instance "
                    f"{self.instance} hosts nothing"
                )
            self._free.extend(guest.slots)
            self.loans[debtor].used -= len(guest.slots)
            self._forget_loan(debtor)

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
        """Begin to move a sealed rBlock to a creditor with credit. It is served from here until
        `commit`."""
        table, debt = self.tables[request], self.debts[creditor]
        assert debt.credit > 0
        debt.credit -= 1
        debt.used += 1
        move = Move(request, index, table.slots[table.place(index)], creditor)
        self.outgoing.append(move)
        return move

    def settle_debt(self, creditor: int) -> tuple[list[int], int]:
        """What the header to `creditor` tells: requests that ended, credit returned. Both stop
        counting as debt."""
        debt = self.debts.get(creditor)
        if debt is None:
            return [], 0
        released, returned = debt.released, debt.returned
        debt.released, debt.returned = {}, 0
        debt.used -= sum(released.values())
        if not debt.total:
            del self.debts[creditor]
        return list(released), returned

    # -- both -----------------------------------------------------------------------------------

    def commit(self) -> None:
        """The bytes of all moves have arrived: from now on the creditors serve them."""
        for move in self.outgoing:
            self._free.append(self.tables[move.request].to_creditor(move.block, move.peer))
        for move in self.incoming:
            guest = self.guests.setdefault((move.peer, move.request), Guest())
            guest.slots.append(move.slot)
            guest.indices.append(move.block)
        self.outgoing.clear()
        self.incoming.clear()

    def check(self) -> None:
        """Assert the invariants: every slot has exactly one owner, and the counts agree."""
        owned = [*self._free, *(move.slot for move in self.incoming)]
        moving = [(move.request, move.block) for move in self.outgoing]
        assert len(set(moving)) == len(moving), "an rBlock moves twice at once"
        for table in self.tables.values():
            owned += table.slots
            held = sorted(sum(table.remote.values(), list(table.indices)))
            assert held == list(range(table.blocks)), "a logical rBlock is lost or owned twice"
        for guest in self.guests.values():
            owned += guest.slots
        assert sorted(owned) == list(range(self.num_blocks)), "a slot is lost or owned twice"
        assert self.usable >= 0, "more set aside than free"
        assert self.lent <= self.lend_cap, "more lent than the cap"
        for debtor, loan in self.loans.items():
            hosted = sum(len(g.slots) for (d, _), g in self.guests.items() if d == debtor)
            arriving = sum(move.peer == debtor for move in self.incoming)
            assert loan.used == hosted + arriving, "a loan's count differs from its guests"

    def _forget_loan(self, debtor: int) -> None:
        if not self.loans[debtor].total:
            del self.loans[debtor]
