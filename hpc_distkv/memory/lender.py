"""What an instance lends, and what it hosts for others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_distkv.memory.loan import Guest, Loan, Move, MoveKind, ProtocolError
from hpc_distkv.memory.prefix import PrefixTree
from hpc_distkv.memory.table import BlockTable


class Lender:
    """Owner of an instance's slots, loans and guests: the part of its RManager that faces its
    debtors."""

    def __init__(self, instance: int, num_blocks: int, lend_cap: int | None) -> None:
        self.instance = instance
        self.num_blocks = num_blocks
        self.lend_cap = num_blocks if lend_cap is None else lend_cap
        self.promised = 0
        self.tables: dict[int, BlockTable] = {}
        """By request, and by prefix."""
        self.prefixes = PrefixTree(self.tables)
        self.guests: dict[tuple[int, int], Guest] = {}
        """(debtor, its request or prefix) → what is hosted of it."""
        self.loans: dict[int, Loan] = {}
        self.outgoing: list[Move] = []
        """Under way, like `incoming`."""
        self.incoming: list[Move] = []
        self._free = list(range(num_blocks - 1, -1, -1))

    # -- capacity -------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slots that hold nothing in use, whatever they are set aside for."""
        return len(self._free) + self.prefixes.idle

    @property
    def usable(self) -> int:
        """Slots this instance may fill itself: free, not promised, not set aside for a debtor."""
        return self.free - self.promised - self._set_aside

    @property
    def lent(self) -> int:
        """rBlocks lent or set aside for debtors."""
        return sum(loan.total for loan in self.loans.values())

    @property
    def _set_aside(self) -> int:
        return sum(loan.unopened + loan.credit for loan in self.loans.values())

    # -- promises and credit --------------------------------------------------------------------

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

    # -- guests ---------------------------------------------------------------------------------

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
            accepted.append(Move(request, index, slot, debtor, MoveKind.RECALL))
        self.outgoing.extend(accepted)
        return accepted

    def split_guests(self, debtor: int, splits: Iterable[tuple[int, int, int]]) -> None:
        """Split the guests of `debtor`'s prefixes as it has split these (`loan.Split`)."""
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

    def _take(self) -> int:
        """A slot for something new. The caller has seen that there is one."""
        return self._free.pop() if self._free else self.prefixes.evict()

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
