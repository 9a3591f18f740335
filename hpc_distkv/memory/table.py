"""Where each rBlock of one request is."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field


@dataclass
class BlockTable:
    """Logical rBlock j of a request → a slot of its home pool, or the instance that hosts it.

    Only its RManager writes it. rBlocks stay in logical order in both lists, so positions inside
    `slots` ascend and the unsealed tail, which never travels, is always the last.
    """

    slots: list[int] = field(default_factory=list)
    """Home slots of the rBlocks that are at home."""
    indices: list[int] = field(default_factory=list)
    """Logical index of each of `slots`."""
    remote: dict[int, list[int]] = field(default_factory=dict)
    """Creditor → logical indices of the rBlocks it hosts, in the order it received them."""
    remote_blocks: int = 0
    """rBlocks hosted elsewhere: all of `remote`."""
    dropped: int = 0
    """rBlocks that no query will see any more; they were the first, and are nowhere."""

    @property
    def held(self) -> int:
        """rBlocks that are somewhere."""
        return len(self.slots) + self.remote_blocks

    @property
    def blocks(self) -> int:
        """Logical rBlocks in all, dropped ones included."""
        return self.dropped + self.held

    @property
    def absent(self) -> int:
        """Logical rBlocks that are not at home."""
        return self.dropped + self.remote_blocks

    def add(self, slot: int) -> None:
        """Append a logical rBlock at home."""
        self.indices.append(self.blocks)
        self.slots.append(slot)

    def place(self, index: int) -> int:
        """Where logical rBlock `index`, which is at home, stands in both lists."""
        return bisect.bisect_left(self.indices, index)

    def to_creditor(self, index: int, creditor: int) -> int:
        """Logical rBlock `index` is now hosted by `creditor`; returns the home slot it left."""
        at = self.place(index)
        del self.indices[at]
        self.remote.setdefault(creditor, []).append(index)
        self.remote_blocks += 1
        return self.slots.pop(at)

    def to_home(self, index: int, creditor: int, slot: int) -> None:
        """Logical rBlock `index`, hosted by `creditor` so far, is now in home slot `slot`."""
        hosted = self.remote[creditor]
        hosted.remove(index)
        self.remote_blocks -= 1
        if not hosted:
            del self.remote[creditor]
        at = self.place(index)
        self.indices.insert(at, index)
        self.slots.insert(at, slot)

    def drop(self, first: int) -> tuple[list[int], dict[int, int]]:
        """Forget the rBlocks before logical rBlock `first`: the home slots that they leave, and
        creditor → how many it hosts."""
        at = self.place(first)
        left, self.slots, self.indices = self.slots[:at], self.slots[at:], self.indices[at:]
        away: dict[int, int] = {}
        for creditor, hosted in list(self.remote.items()):
            kept = [index for index in hosted if index >= first]
            if len(kept) < len(hosted):
                away[creditor] = len(hosted) - len(kept)
                self.remote_blocks -= away[creditor]
                self.remote[creditor] = kept
            if not kept:
                del self.remote[creditor]
        self.dropped = first
        return left, away
