"""Who holds which rBlock of one instance: its own requests, and its guests."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_distkv.ids import InstanceId, RequestId, TableKey
from hpc_distkv.memory.books.borrower import Borrower
from hpc_distkv.memory.books.integrity import check
from hpc_distkv.memory.books.lender import Lender
from hpc_distkv.memory.books.slots import FreeSlots
from hpc_distkv.memory.books.swap import SwapMove, SwapSpace
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.memory.prefix import Prefix, PrefixTree
from hpc_distkv.memory.table import BlockTable


class RManager:
    """Owner of one instance's block tables; does what concerns several of its parts: `slots`,
    `prefixes`, `lender`, `borrower` and `swap`, each the only writer of its fields. Pure
    bookkeeping: it never sees a byte of KV, a message or a clock.

    A loan's life, with the one who writes each line in brackets:
        lender.promise [creditor] → settle a grant [gManager's answer]
        → open_credit [mail to debtor], borrower.credit_opened [debtor]
        → borrower.move_out [debtor] / lender.host [creditor, from the header]
        → bytes travel → commit [both]
        → borrower.bring_home [debtor] / lender.give_back [creditor, from the header]
        → bytes travel → commit [both]
        or close [debtor] → released, lender.evict [header to creditor]
    A migration is a loan of copies (`borrower.copy_out`) that ends with hand_over [debtor] / adopt
    [creditor, from the header].
    The host's memory (`swap`) serves rBlocks, and keeps those of preempted requests:
        swap.spill → bytes travel → commit → served there → swap.bring_home → bytes travel → commit
        swap_out → bytes travel → commit, finish_swap_out → resume → swap.bring_home …
    Every slot is free, in one block table, in one guest, or receiving; `check` proves it. Requests
    share sealed rBlocks through the tables of prefixes (`PrefixTree`).
    """

    def __init__(
        self,
        instance: InstanceId,
        num_blocks: int,
        lend_cap: int | None = None,
        host_blocks: int = 0,
    ) -> None:
        self.instance = instance
        self.tables: dict[TableKey, BlockTable] = {}
        """By request, and by prefix."""
        self.prefixes = PrefixTree(self.tables)
        self.slots = FreeSlots(num_blocks, self.prefixes)
        self.lender = Lender(instance, self.slots, lend_cap)
        self.borrower = Borrower(self.slots, self.tables)
        self.swap = SwapSpace(host_blocks, self.slots, self.tables)

    @property
    def held(self) -> int:
        """rBlocks of this instance's requests, wherever they are."""
        own = self.slots.num_blocks - self.slots.free - self.lender.hosted
        return own + self.borrower.borrowed

    def parts(self, request: RequestId) -> dict[TableKey, BlockTable]:
        """All block tables whose rBlocks a request's queries see, the last ones first."""
        tables: dict[TableKey, BlockTable] = {request: self.tables[request]}
        return tables | {p.id: p for p in self.prefixes.chain(request)[::-1]}

    def held_alone(self, request: RequestId, at: InstanceId | None = None) -> int:
        """rBlocks that are free when the request is closed, at creditor `at` only if given."""
        tables = [self.tables[request], *self.prefixes.used_alone(request)]
        return sum(t.held if at is None else len(t.remote.get(at, ())) for t in tables)

    # -- a request's life -----------------------------------------------------------------------

    def open(self, request: RequestId, keys: Sequence[bytes] = ()) -> BlockTable:
        """Open an empty block table for a request, which continues the prefix of its prompt that is
        here. `keys`: of the rBlocks of the prompt that may be shared."""
        assert request not in self.tables
        found = self.prefixes.find(keys, self.slots.usable) if keys else None
        prefix = self._end_at(*found) if found else None
        self.prefixes.join(request, prefix, keys)
        table = self.tables[request] = BlockTable(start=prefix.blocks if prefix else 0)
        return table

    def grow(self, request: RequestId, blocks: int) -> None:
        """Append `blocks` home rBlocks to a table. The caller has looked at `usable`."""
        assert 0 <= blocks <= self.slots.usable
        table = self.tables[request]
        for _ in range(blocks):
            table.add(self.slots.take())

    def drop(self, request: RequestId, first: int) -> None:
        """No query will see a request's rBlocks before logical rBlock `first` any more: free them,
        at home now and at its creditors by the next header. Its moves must have been committed."""
        part = self.tables[request].cut(first)
        self._free(request, part)
        self.borrower.drop(request, part, first)

    def close(self, request: RequestId) -> None:
        """Free a request's rBlocks, but those that others share, at home now and at its creditors
        by the next header. Its moves must have been committed."""
        tables: list[tuple[TableKey, BlockTable]] = [(request, self.tables.pop(request))]
        tables += [(prefix.id, prefix) for prefix in self.prefixes.leave(request)]
        for key, table in tables:
            self._free(key, table)
            self.borrower.release(key, table)

    # -- migration ------------------------------------------------------------------------------

    def hand_over(self, request: RequestId) -> None:
        """A request of which every rBlock was copied belongs to the creditor from now on."""
        table = self.tables.pop(request)
        assert self.borrower.copies[request].blocks == len(table.slots) == table.blocks
        self.slots.release(table.slots)
        self.borrower.hand_over(request)

    def adopt(self, debtor: InstanceId, request: RequestId) -> None:
        """The guest of `debtor`'s request is the block table of a request of this instance."""
        guest = self.lender.pop_guest(debtor, request)
        if request in self.tables or sorted(guest.indices) != list(range(len(guest.indices))):
            raise ProtocolError(
                f"instance {debtor} handed over request {request}, of which instance "
                f"{self.instance} does not have every rBlock"
            )
        table = self.open(request)
        for _, slot in sorted(zip(guest.indices, guest.slots, strict=True)):
            table.add(slot)

    # -- swapping -------------------------------------------------------------------------------

    def can_swap_out(self, request: RequestId, sealed: int) -> bool:
        """True if the host's memory has room for the first `sealed` rBlocks of a request, without
        those that others use too. None of the others may be at a creditor: the request will need
        all of them when it is resumed."""
        table, alone = self.tables[request], self.prefixes.used_alone(request)
        if table.remote or any(prefix.remote_blocks for prefix in alone):
            return False
        blocks = sum(len(prefix.slots) for prefix in alone) + table.place(sealed)
        return request not in self.borrower.copies and 0 < blocks <= self.swap.free

    def swap_out(self, request: RequestId, sealed: int) -> list[SwapMove]:
        """Begin to copy these rBlocks to the host's memory. When they have arrived,
        `finish_swap_out`."""
        parts = [*self.prefixes.used_alone(request)[::-1], self.tables[request]]
        blocks = [
            (index, slot)
            for part in parts
            for index, slot in zip(part.indices, part.slots, strict=True)
            if index < sealed
        ]
        shared = parts[0].start if self.prefixes.last(request) else 0
        return self.swap.copy_out(request, shared, blocks)

    def finish_swap_out(self, request: RequestId) -> None:
        """Close a request, but keep its rBlocks in the host's memory."""
        self.tables[request].in_host.clear()
        self.close(request)

    def resume(self, request: RequestId, keys: Sequence[bytes] = ()) -> BlockTable:
        """Open the block table of a swapped-out request: its rBlocks are in the host's memory, but
        for those of its prompt that are here (`keys` as of `open`). If the prefix that it shared
        was evicted, the table is empty: the request is computed again."""
        found = self.prefixes.find(keys, self.slots.usable) if keys else None
        length = found[1] if found else 0
        if length < self.swap.swapped[request]:
            self.swap.discard(request)
            return self.open(request, keys)
        self.prefixes.join(request, self._end_at(*found) if found else None, ())
        in_host = self.swap.resume(request, length)
        table = BlockTable(in_host=in_host, remote_blocks=len(in_host))
        table.start = in_host[0] if in_host else length
        self.tables[request] = table
        return table

    # -- all parts ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants: every slot has exactly one owner, and the counts agree."""
        check(self)

    def _end_at(self, prefix: Prefix, length: int) -> Prefix:
        """The prefix that ends with rBlock `length` of the prompt: `prefix`, or a part of it."""
        if length == prefix.blocks:
            return prefix
        new = self.prefixes.split(prefix, length)
        if new.in_host:
            self.swap.split(prefix.id, length, new.id)
        self.borrower.split(prefix, new)
        return new

    def _free(self, key: TableKey, table: BlockTable) -> None:
        """Free what the table of a request or prefix, or a part of it, has on this rank."""
        assert not self.borrower.moves(key)
        assert not self.swap.moves(key)
        self.slots.release(table.slots)
        if table.in_host:
            self.swap.release(key, table.in_host)
