"""Where each rBlock of one request is."""

from __future__ import annotations

import bisect
from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from hpc_distkv.ids import InstanceId

Slots: TypeAlias = "array[int]"
"""Of int32s, which numpy reads as they are."""
no_slots = partial(array, "i")


@dataclass
class BlockTable:
    """Logical rBlock j of a request → a slot of its home pool, the instance that hosts it, or the
    host's memory.

    Only its RManager and the parts of that write it. rBlocks stay in logical order in both lists,
    so positions inside `slots` ascend and the unsealed tail, which never travels, is always the
    last.
    """

    slots: Slots = field(default_factory=no_slots)
    """Home slots of the rBlocks that are at home."""
    indices: Slots = field(default_factory=no_slots)
    """Logical index of each of `slots`."""
    remote: dict[InstanceId, list[int]] = field(default_factory=dict)
    """Creditor → logical indices of the rBlocks it hosts, in the order it received them."""
    in_host: list[int] = field(default_factory=list)
    """Logical indices of the rBlocks that are served in the host's memory."""
    remote_blocks: int = 0
    """rBlocks elsewhere than at home: all of `remote` and `in_host`."""
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

    def to_creditor(self, index: int, creditor: InstanceId) -> int:
        """Logical rBlock `index` is now hosted by `creditor`; returns the home slot it left."""
        self.remote.setdefault(creditor, []).append(index)
        return self._leave_home(index)

    def to_host(self, index: int) -> int:
        """Logical rBlock `index` is now in the host's memory; returns the home slot it left."""
        self.in_host.append(index)
        return self._leave_home(index)

    def to_home(self, index: int, creditor: InstanceId, slot: int) -> None:
        """Logical rBlock `index`, hosted by `creditor` so far, is now in home slot `slot`."""
        hosted = self.remote[creditor]
        hosted.remove(index)
        if not hosted:
            del self.remote[creditor]
        self._come_home(index, slot)

    def from_host(self, index: int, slot: int) -> None:
        """Logical rBlock `index`, in the host's memory so far, is now in home slot `slot`."""
        self.in_host.remove(index)
        self._come_home(index, slot)

    def _leave_home(self, index: int) -> int:
        at = self.place(index)
        del self.indices[at]
        self.remote_blocks += 1
        return self.slots.pop(at)

    def _come_home(self, index: int, slot: int) -> None:
        self.remote_blocks -= 1
        at = self.place(index)
        self.indices.insert(at, index)
        self.slots.insert(at, slot)

    def cut(self, first: int) -> BlockTable:
        """Take out the rBlocks before logical rBlock `first`, as a table of their own."""
        at = self.place(first)
        part = BlockTable(self.slots[:at], self.indices[:at], start=self.start)
        self.slots, self.indices = self.slots[at:], self.indices[at:]
        for creditor, hosted in list(self.remote.items()):
            early, late = _parted(hosted, first)
            if early:
                part.remote[creditor], self.remote[creditor] = early, late
            if not late:
                del self.remote[creditor]
        part.in_host, self.in_host = _parted(self.in_host, first)
        part.remote_blocks = len(part.in_host) + sum(map(len, part.remote.values()))
        self.remote_blocks -= part.remote_blocks
        self.start = first
        return part


def _parted(indices: list[int], first: int) -> tuple[list[int], list[int]]:
    """Those before `first`, and the others."""
    return [i for i in indices if i < first], [i for i in indices if i >= first]
