"""What an instance lends, and what it hosts for others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hpc_distkv.ids import InstanceId, PrefixId, TableKey
from hpc_distkv.memory.books.slots import FreeSlots
from hpc_distkv.memory.loan import Guest, Loan, Move, MoveKind, ProtocolError


class Lender:
    """Owner of what an instance has promised and lent, and of its guests: the part of its RManager
    that faces its debtors."""

    def __init__(self, instance: InstanceId, slots: FreeSlots, lend_cap: int | None) -> None:
        self.lend_cap = slots.num_blocks if lend_cap is None else lend_cap
        """Most rBlocks that are lent at once."""
        self.promised = 0
        """Slots reserved until the answer to the last report."""
        self.loans: dict[InstanceId, Loan] = {}
        """By debtor."""
        self.guests: dict[tuple[InstanceId, TableKey], Guest] = {}
        """(debtor, its request or prefix) → what is hosted of it."""
        self.outgoing: list[Move] = []
        """rBlocks on their way back to debtors."""
        self.incoming: list[Move] = []
        """rBlocks on their way here from debtors."""
        self._instance, self._slots = instance, slots

    @property
    def lent(self) -> int:
        """rBlocks lent to debtors or reserved for them."""
        return sum(loan.total for loan in self.loans.values())

    @property
    def hosted(self) -> int:
        """rBlocks of debtors that are here, or on their way here."""
        return sum(loan.used for loan in self.loans.values())

    # -- promises and credit --------------------------------------------------------------------

    def promise(self, blocks: int) -> int:
        """Reserve up to `blocks` slots until `settle`; returns how many."""
        assert not self.promised
        self.promised = max(0, min(blocks, self._slots.usable, self.lend_cap - self.lent))
        self._slots.reserve(self.promised)
        return self.promised

    def settle(self, grants: Mapping[InstanceId, int]) -> list[InstanceId]:
        """End the promise; what of it was granted stays reserved for its debtor. Returns the
        debtors whose grant went beyond the promise and was refused."""
        left, self.promised = self.promised, 0
        refused = []
        for debtor, blocks in grants.items():
            if blocks > left or blocks < 0 or debtor == self._instance:
                refused.append(debtor)
                continue
            left -= blocks
            self.loans.setdefault(debtor, Loan()).unopened += blocks
        self._slots.unreserve(left)
        return refused

    def open_credit(self, debtor: InstanceId) -> int:
        """The grants that `debtor` is told of now."""
        loan = self.loans.get(debtor)
        if loan is None:
            return 0
        opened, loan.unopened = loan.unopened, 0
        loan.credit += opened
        return opened

    def take_back(self, debtor: InstanceId, blocks: int) -> None:
        """`debtor` returns unused credit."""
        if not blocks:
            return
        loan = self.loans.get(debtor, Loan())
        if not 0 < blocks <= loan.credit:
            raise ProtocolError(
                f"instance {debtor} returned {blocks} rBlocks of credit to instance "
                f"{self._instance}, which had set aside {loan.credit} for it"
            )
        loan.credit -= blocks
        self._slots.unreserve(blocks)
        self._forget_loan(debtor)

    # -- guests ---------------------------------------------------------------------------------

    def host(self, debtor: InstanceId, moves: Iterable[tuple[TableKey, int]]) -> list[Move]:
        """Take a reserved slot for each (request or prefix, logical index) that `debtor`
        announces."""
        accepted = []
        for key, index in moves:
            loan = self.loans.get(debtor, Loan())
            if loan.credit < 1:
                raise ProtocolError(
                    f"instance {debtor} sent instance {self._instance} an rBlock of request "
                    f"{key} without credit"
                )
            loan.credit -= 1
            loan.used += 1
            self._slots.unreserve(1)
            accepted.append(Move(key, index, self._slots.take(), debtor))
        self.incoming.extend(accepted)
        return accepted

    def give_back(self, debtor: InstanceId, recalls: Iterable[tuple[TableKey, int]]) -> list[Move]:
        """Begin to return the rBlocks (request or prefix, logical index) that `debtor` calls
        home."""
        accepted = []
        for key, index in recalls:
            guest = self.guests.get((debtor, key), Guest())
            if index not in guest.indices:
                raise ProtocolError(
                    f"instance {debtor} calls home rBlock {index} of request {key}, which "
                    f"instance {self._instance} does not host"
                )
            slot = guest.slots[guest.indices.index(index)]
            accepted.append(Move(key, index, slot, debtor, MoveKind.RECALL))
        self.outgoing.extend(accepted)
        return accepted

    def commit(self, outgoing: Iterable[Move], incoming: Iterable[Move]) -> None:
        """These moves have arrived: what came is served here, the slots of what left are free."""
        for move in outgoing:
            self.outgoing.remove(move)
            guest = self.guests[move.peer, move.key]
            at = guest.indices.index(move.block)
            del guest.indices[at]
            self._free(move.peer, move.key, guest, [guest.slots.pop(at)])
        for move in incoming:
            self.incoming.remove(move)
            guest = self.guests.setdefault((move.peer, move.key), Guest())
            guest.slots.append(move.slot)
            guest.indices.append(move.block)

    def split(self, debtor: InstanceId, splits: Iterable[tuple[PrefixId, int, PrefixId]]) -> None:
        """Split the guests of `debtor`'s prefixes as it has split these (`loan.Split`)."""
        for prefix, first, new in splits:
            guest = self.guests.get((debtor, prefix), Guest())
            part = guest.cut(first)
            if not part.slots or (debtor, new) in self.guests:
                raise ProtocolError(
                    f"instance {debtor} split prefix {prefix} at rBlock {first}, of which instance "
                    f"{self._instance} hosts none before"
                )
            self.guests[debtor, new] = part
            if not guest.slots:
                del self.guests[debtor, prefix]

    def evict(self, debtor: InstanceId, keys: Iterable[TableKey]) -> None:
        """Free the guests of `debtor`'s requests and prefixes that ended."""
        for key in keys:
            self._slots.release(self.pop_guest(debtor, key).slots)

    def evict_dropped(self, debtor: InstanceId, dropped: Iterable[tuple[TableKey, int]]) -> None:
        """Free what `debtor` has dropped of its requests: (request, first logical rBlock kept)."""
        for request, first in dropped:
            guest = self.guests.get((debtor, request), Guest())
            left = guest.cut(first).slots
            if not left:
                raise ProtocolError(
                    f"instance {debtor} dropped rBlocks before {first} of request {request}, of "
                    f"which instance {self._instance} hosts none"
                )
            self._free(debtor, request, guest, left)

    def pop_guest(self, debtor: InstanceId, key: TableKey) -> Guest:
        """Remove a guest. Its slots are the caller's."""
        guest = self.guests.pop((debtor, key), None)
        if guest is None:
            raise ProtocolError(
                f"instance {debtor} released request {key}, of which instance "
                f"{self._instance} hosts nothing"
            )
        self.loans[debtor].used -= len(guest.slots)
        self._forget_loan(debtor)
        return guest

    def _free(self, debtor: InstanceId, key: TableKey, guest: Guest, slots: list[int]) -> None:
        """Free these slots, which were taken from a guest."""
        self._slots.release(slots)
        if not guest.slots:
            del self.guests[debtor, key]
        self.loans[debtor].used -= len(slots)
        self._forget_loan(debtor)

    def _forget_loan(self, debtor: InstanceId) -> None:
        if not self.loans[debtor].total:
            del self.loans[debtor]
