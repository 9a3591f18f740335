"""Which slots of an instance's pool are free."""

from __future__ import annotations

from collections.abc import Iterable

from hpc_distkv.memory.prefix import PrefixTree


class FreeSlots:
    """Owner of the free slots of the pool, and of how many of them are reserved for debtors. The
    rBlocks of prefixes that nobody uses count as free: they are evicted when their slots are
    wanted."""

    def __init__(self, num_blocks: int, prefixes: PrefixTree) -> None:
        self.num_blocks = num_blocks
        """Of the pool."""
        self.reserved = 0
        """Free slots that are promised, granted or opened to debtors."""
        self.empty = list(range(num_blocks - 1, -1, -1))
        """Slots that hold nothing; the last is taken first."""
        self._prefixes = prefixes

    @property
    def free(self) -> int:
        """Slots that hold nothing in use, reserved or not."""
        return len(self.empty) + self._prefixes.idle

    @property
    def usable(self) -> int:
        """Slots that the instance may fill itself: free and not reserved."""
        return len(self.empty) + self._prefixes.idle - self.reserved

    def take(self) -> int:
        """A slot for something new. The caller has looked at `usable`, or has a reserved one."""
        return self.empty.pop() if self.empty else self._prefixes.evict()

    def release(self, slots: Iterable[int]) -> None:
        """These slots hold nothing any more."""
        self.empty.extend(slots)

    def reserve(self, blocks: int) -> None:
        """Reserve `blocks` more free slots for debtors."""
        self.reserved += blocks

    def unreserve(self, blocks: int) -> None:
        """Reserve `blocks` fewer."""
        self.reserved -= blocks
