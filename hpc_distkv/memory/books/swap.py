"""Which rBlocks of an instance are in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable


class SwapSpace:
    """Owner of an instance's slots in the host's memory (`HOST`). They hold rBlocks of its own
    requests and prefixes only, of two kinds:

    * what a block table names in `remote[HOST]` is served where it is;
    * what a preempted request had computed waits there until the request is resumed.

    A slot is reserved before the copy there begins, and given up when a copy back has arrived.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.slots: dict[int, dict[int, int]] = {}
        """Request or prefix → logical index of an rBlock → its slot."""
        self.swapped: dict[int, int] = {}
        """Request that is swapped out, or on its way there → the rBlocks of the prefix that it
        shared with others then: they are not among `slots`."""
        self._free = list(range(num_blocks - 1, -1, -1))

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
        """Whether a block table names anything here, or something moves."""
        return len(self.slots) > len(self.swapped)

    def computed(self, request: int) -> int:
        """rBlocks a swapped-out request has computed; 0 if it is not swapped out."""
        return max(self.slots[request]) + 1 if request in self.swapped else 0

    def take(self, key: int, index: int) -> None:
        """Reserve a slot for rBlock `index` of a request or prefix. The caller has looked at
        `free`."""
        blocks = self.slots.setdefault(key, {})
        assert index not in blocks
        blocks[index] = self._free.pop()

    def give_up(self, key: int, indices: Iterable[int]) -> None:
        """Nobody needs these rBlocks here any more."""
        blocks = self.slots[key]
        self._free.extend(blocks.pop(index) for index in indices)
        if not blocks:
            del self.slots[key]

    def discard(self, request: int) -> None:
        """Free what is kept for a swapped-out request, if it is one."""
        if self.swapped.pop(request, None) is not None:
            self._free.extend(self.slots.pop(request).values())

    def split(self, prefix: int, first: int, new: int) -> None:
        """The rBlocks of a prefix before logical rBlock `first` are the prefix `new`'s now."""
        blocks = self.slots.pop(prefix)
        for key, part in (
            (new, {index: slot for index, slot in blocks.items() if index < first}),
            (prefix, {index: slot for index, slot in blocks.items() if index >= first}),
        ):
            if part:
                self.slots[key] = part
