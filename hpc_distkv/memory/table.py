"""Where each rBlock of one request is."""

from __future__ import annotations

import bisect
from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

Slots: TypeAlias = "array[int]"
"""Of int32s, which numpy reads as they are."""
no_slots = partial(array, "i")


@dataclass
class BlockTable:
    """Logical rBlock j of a request → a slot of its home pool, or the instance that hosts it.

    Only its RManager writes it. rBlocks stay in logical order in both lists, so positions inside
    `slots` ascend and the unsealed tail, which never travels, is always the last.
    """

    slots: Slots = field(default_factory=no_slots)
    """Home slots of the rBlocks that are at home."""
    indices: Slots = field(default_factory=no_slots)
    """Logical index of each of `slots`."""
    remote: dict[int, list[int]] = field(default_factory=dict)
    """Creditor → logical indices of the rBlocks it hosts, in the order it received them."""
    remote_blocks: int = 0
    """rBlocks hosted elsewhere: all of `remote`."""
    start: int = 0
    """Logical index of the first rBlock that may be in this table. Those before belong to a prefix
    that it continues, or no query will see them any more."""

    @property
    def held(self) -> int:
        """rBlocks that are somewhere."""
        return len(self.slots) + self.remote_blocks

    @property
    def blocks(self) -> int:
        """Logical rBlocks in all, those before `start` included."""
        return self.start + self.held

    @property
    def absent(self) -> int:
        """Logical rBlocks that this table does not have at home."""
        return self.start + self.remote_blocks

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

    def cut(self, first: int) -> BlockTable:
        """Take out the rBlocks before logical rBlock `first`, as a table of their own."""
        at = self.place(first)
        part = BlockTable(self.slots[:at], self.indices[:at], start=self.start)
        self.slots, self.indices = self.slots[at:], self.indices[at:]
        for creditor, hosted in list(self.remote.items()):
            kept = [index for index in hosted if index >= first]
            if len(kept) < len(hosted):
                part.remote[creditor] = [index for index in hosted if index < first]
                part.remote_blocks += len(hosted) - len(kept)
                self.remote[creditor] = kept
            if not kept:
                del self.remote[creditor]
        self.remote_blocks -= part.remote_blocks
        self.start = first
        return part
