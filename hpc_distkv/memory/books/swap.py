"""Which rBlocks of an instance are in the host's memory."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hpc_distkv.ids import PrefixId, RequestId, TableKey
from hpc_distkv.memory.books.slots import FreeSlots
from hpc_distkv.memory.table import BlockTable


class SwapMove(NamedTuple):
    """An rBlock on its way to the host's memory, or home. Until `commit` it is served from where it
    was."""

    key: TableKey
    """Request or prefix."""
    block: int
    """Logical index."""
    slot: int
    """Of the home pool."""
    copy: bool = False
    """True if it stays at home too, until its request is swapped out."""


class SwapSpace:
    """Owner of an instance's slots in the host's memory. They hold rBlocks of its own requests and
    prefixes only, of two kinds:

    * what a block table names in `in_host` is served where it is;
    * what a preempted request had computed waits there until the request is resumed.

    A slot is reserved before the copy there begins, and released when a copy back has arrived.
    """

    def __init__(
        self, num_blocks: int, home: FreeSlots, tables: Mapping[TableKey, BlockTable]
    ) -> None:
        self.num_blocks = num_blocks
        self.slots: dict[TableKey, dict[int, int]] = {}
        """Request or prefix → logical index of an rBlock → its slot."""
        self.swapped: dict[RequestId, int] = {}
        """Request that is swapped out, or on its way there → the rBlocks of the prefix that it
        shared with others then: they are not among `slots`."""
        self.outgoing: list[SwapMove] = []
        """rBlocks on their way to the host's memory."""
        self.incoming: list[SwapMove] = []
        """rBlocks on their way home."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._home, self._tables = home, tables

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Slots that hold something, or will."""
        return self.num_blocks - len(self._free)

    @property
    def serves(self) -> bool:
        """True if a block table names an rBlock here, or one moves."""
        return len(self.slots) > len(self.swapped)

    def computed(self, request: RequestId) -> int:
        """rBlocks a swapped-out request has computed; 0 if it is not swapped out."""
        return max(self.slots[request]) + 1 if request in self.swapped else 0

    # -- moves ----------------------------------------------------------------------------------

    def spill(self, key: TableKey, index: int) -> SwapMove:
        """Begin to move a sealed rBlock of a request or prefix here; there must be a free slot."""
        table = self._tables[key]
        return self._send(SwapMove(key, index, table.slots[table.place(index)]))

    def copy_out(
        self, request: RequestId, shared: int, blocks: Iterable[tuple[int, int]]
    ) -> list[SwapMove]:
        """Begin to copy a request's rBlocks (logical index, home slot) here, all but the first
        `shared` ones."""
        self.swapped[request] = shared
        return [self._send(SwapMove(request, index, slot, copy=True)) for index, slot in blocks]

    def bring_home(self, key: TableKey, index: int) -> SwapMove:
        """Begin to bring an rBlock back that is served here; there must be a usable slot."""
        assert self._home.usable > 0
        move = SwapMove(key, index, self._home.take())
        self.incoming.append(move)
        return move

    def commit(self, outgoing: Iterable[SwapMove], incoming: Iterable[SwapMove]) -> None:
        """These moves have arrived: from now on they are served where they went."""
        for move in outgoing:
            self.outgoing.remove(move)
            if not move.copy:
                self._home.release((self._tables[move.key].to_host(move.block),))
        for move in incoming:
            self.incoming.remove(move)
            self._tables[move.key].from_host(move.block, move.slot)
            self.release(move.key, (move.block,))

    def moves(self, key: TableKey) -> bool:
        """True if rBlocks of a request or prefix are on their way here or home."""
        return key in [move.key for move in (*self.outgoing, *self.incoming)]

    def _send(self, move: SwapMove) -> SwapMove:
        """Reserve a slot for a move here."""
        blocks = self.slots.setdefault(move.key, {})
        assert move.block not in blocks
        blocks[move.block] = self._free.pop()
        self.outgoing.append(move)
        return move

    # -- ends -----------------------------------------------------------------------------------

    def release(self, key: TableKey, indices: Iterable[int]) -> None:
        """Nobody needs these rBlocks here any more."""
        blocks = self.slots[key]
        self._free.extend(blocks.pop(index) for index in indices)
        if not blocks:
            del self.slots[key]

    def discard(self, request: RequestId) -> None:
        """Free what is kept for a swapped-out request, if it is one."""
        if self.swapped.pop(request, None) is not None:
            self._free.extend(self.slots.pop(request).values())

    def resume(self, request: RequestId, first: int) -> list[int]:
        """A request that was swapped out is open again, and has its rBlocks before logical rBlock
        `first` at home. Returns the logical indices of the others, which are served here now."""
        del self.swapped[request]
        blocks = sorted(self.slots[request])
        at = bisect.bisect_left(blocks, first)
        if at:
            self.release(request, blocks[:at])
        return blocks[at:]

    def split(self, prefix: PrefixId, first: int, new: PrefixId) -> None:
        """The rBlocks of a prefix before logical rBlock `first` are the prefix `new`'s now."""
        blocks = self.slots.pop(prefix)
        for key, part in (
            (new, {index: slot for index, slot in blocks.items() if index < first}),
            (prefix, {index: slot for index, slot in blocks.items() if index >= first}),
        ):
            if part:
                self.slots[key] = part
