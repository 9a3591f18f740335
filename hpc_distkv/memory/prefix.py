"""The prefixes that requests share: sealed rBlocks, found by what they hold."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hpc_distkv.ids import PrefixId, RequestId, TableKey
from hpc_distkv.memory.table import BlockTable

MOST_STALE = 64
"""Entries of the heap that may be no longer true, beyond as many as there are prefixes."""


@dataclass(eq=False)
class Prefix(BlockTable):
    """A run of sealed rBlocks that all prompts with the same tokens up to its end share. It starts
    where its parent ends."""

    id: PrefixId = field(kw_only=True)
    keys: list[bytes] = field(default_factory=list)
    """Of each rBlock: equal for equal tokens from the start of the prompt to its end."""
    parent: Prefix | None = None
    children: set[PrefixId] = field(default_factory=set)
    """The prefixes that continue it."""
    users: int = 0
    """Requests that continue it, and children that are in use."""
    used: int = 0
    """When its last user left."""


class PrefixTree:
    """Owner of the prefixes: who uses them, and which is evicted first.

    A prefix is a block table beside those of requests, so it is lent and brought home as they are.
    A new request continues the longest prefix that its prompt shares with earlier ones, and its own
    rBlocks become part of a prefix as they are sealed. A prefix is in use if a request, or a prefix
    in use, continues it. Others stay as cache until their slots are wanted; the least recently used
    is evicted first, its last rBlock first. A prefix with rBlocks elsewhere is no cache: it is
    freed as soon as nobody uses it, with all that continues it.
    """

    def __init__(self, tables: dict[TableKey, BlockTable]) -> None:
        """`tables`: of the RManager; the prefixes are among them."""
        self.prefixes: dict[PrefixId, Prefix] = {}
        self.idle = 0
        """rBlocks of prefixes that nobody uses: all are at home."""
        self._tables = tables
        self._at: dict[bytes, Prefix] = {}
        """Key of an rBlock → the prefix that has it."""
        self._last: dict[RequestId, Prefix] = {}
        """Request → the prefix that its own table continues."""
        self._computing: dict[RequestId, Sequence[bytes]] = {}
        """Requests that have not sealed all that they may share → the keys of that."""
        self._evictable: list[tuple[int, PrefixId]] = []
        """Heap of (used, id); also has some that are in use again, or gone."""
        self._clock = 0
        self._newest = 0

    # -- who has what ---------------------------------------------------------------------------

    @property
    def computing(self) -> int:
        """Requests that are computing what others may share."""
        return len(self._computing)

    def last(self, request: RequestId) -> Prefix | None:
        """The prefix that a request continues."""
        return self._last.get(request)

    def chain(self, request: RequestId) -> list[Prefix]:
        """All prefixes of a request, the first rBlocks first."""
        last = self._last.get(request)
        return _line(last)[::-1] if last else []

    def used_by(self, requests: Iterable[RequestId]) -> list[Prefix]:
        """The prefixes of these requests, each once."""
        found: dict[PrefixId, Prefix] = {}
        for request in requests:
            prefix = self._last.get(request)
            while prefix and prefix.id not in found:
                found[prefix.id] = prefix
                prefix = prefix.parent
        return list(found.values())

    def at_home(self, requests: Iterable[RequestId]) -> int:
        """rBlocks at home that these requests share or might share, each counted once."""
        return sum(len(prefix.slots) for prefix in self.used_by(requests))

    def used_alone(self, request: RequestId) -> list[Prefix]:
        """The prefixes that nobody uses but this request."""
        alone = []
        for prefix in _line(self._last.get(request)):
            if prefix.users > 1:
                break
            alone.append(prefix)
        return alone

    def match(self, keys: Sequence[bytes]) -> int:
        """How many rBlocks of a prompt are here, from its first on."""
        return bisect.bisect_left(range(len(keys)), True, key=lambda at: keys[at] not in self._at)

    def in_use(self, keys: Sequence[bytes]) -> int:
        """How many rBlocks of a prompt are here and in use: sharing them takes no memory."""
        matched = self.match(keys)
        for prefix in _line(self._at[keys[matched - 1]] if matched else None):
            if prefix.users:
                return min(matched, prefix.blocks)
        return 0

    def coming(self, keys: Sequence[bytes]) -> int:
        """How many rBlocks of a prompt are here, or will be when the requests that compute the same
        prefix have done so."""
        others = (_common(keys, other) for other in self._computing.values())
        return max(self.match(keys), *others, 0)

    def awaited(self, keys: Sequence[bytes]) -> bool:
        """True if a request computes the next rBlock of a prompt beyond those that are here."""
        return bool(self._computing) and self.coming(keys) > self.match(keys)

    # -- requests come and go -------------------------------------------------------------------

    def find(self, keys: Sequence[bytes], idle: int) -> tuple[Prefix, int] | None:
        """The longest prefix of a prompt that is here, of which at most `idle` rBlocks are in
        use by nobody: the prefix that has its last rBlock, and its length in rBlocks."""
        length = min(self.match(keys), self.in_use(keys) + idle)
        return (self._at[keys[length - 1]], length) if length else None

    def split(self, prefix: Prefix, first: int) -> Prefix:
        """Make the rBlocks before logical rBlock `first` a prefix of their own, the parent of what
        is left. Returns it."""
        count = first - prefix.start
        part = prefix.cut(first)
        new = self._add(prefix.parent, part, prefix.keys[:count])
        if prefix.parent:
            prefix.parent.children.remove(prefix.id)
        prefix.keys, prefix.parent = prefix.keys[count:], new
        new.children.add(prefix.id)
        new.users, new.used = int(prefix.users > 0), prefix.used
        return new

    def join(self, request: RequestId, prefix: Prefix | None, keys: Sequence[bytes]) -> None:
        """A request with a prompt of `keys` starts, and continues all of `prefix`."""
        if prefix:
            self._last[request] = prefix
            self._use(prefix)
        if len(keys) > (prefix.blocks if prefix else 0):
            self._computing[request] = keys

    def seal(self, request: RequestId, blocks: int) -> None:
        """The first `blocks` rBlocks of a request are full: others may share its prompt's."""
        keys = self._computing.get(request)
        if keys is None:
            return
        table = self._tables[request]
        while table.start < min(blocks, len(keys)):
            if keys[table.start] in self._at:  # There was no room to share that: it keeps its own.
                del self._computing[request]
                return
            self._take_over(request, table, keys[table.start])
        if table.start == len(keys):
            del self._computing[request]

    def leave(self, request: RequestId) -> list[Prefix]:
        """A request ends, or is preempted. Returns the prefixes that are freed with it."""
        self._computing.pop(request, None)
        gone: list[Prefix] = []
        self._clock += 1
        prefix = self._last.pop(request, None)
        while prefix:
            prefix.users -= 1
            if prefix.users:
                break
            prefix.used = self._clock
            self.idle += len(prefix.slots)
            self._offer(prefix)
            if prefix.remote_blocks:
                self._forget(prefix, gone)
            prefix = prefix.parent
        return gone

    def evict(self) -> int:
        """Evict the least recently used rBlock; `idle` was above 0. Returns its slot."""
        prefix = self._oldest()
        slot = prefix.slots.pop()
        prefix.indices.pop()
        del self._at[prefix.keys.pop()]
        self.idle -= 1
        if not prefix.keys:
            self._detach(prefix)
        return slot

    def _use(self, prefix: Prefix | None) -> None:
        while prefix:
            prefix.users += 1
            if prefix.users > 1:
                return
            self.idle -= len(prefix.slots)
            prefix = prefix.parent

    def _add(self, parent: Prefix | None, part: BlockTable, keys: list[bytes]) -> Prefix:
        self._newest -= 1
        new = Prefix(**vars(part), id=PrefixId(self._newest), keys=keys, parent=parent)
        self._tables[new.id] = self.prefixes[new.id] = new
        self._at.update(dict.fromkeys(keys, new))
        if parent:
            parent.children.add(new.id)
        return new

    def _take_over(self, request: RequestId, table: BlockTable, key: bytes) -> None:
        """The first rBlock of a request's table is the next one of what others may share."""
        prefix = self._last.get(request)
        if prefix is None or prefix.users > 1 or prefix.children:
            prefix = self._last[request] = self._add(prefix, BlockTable(start=table.start), [])
            prefix.users = 1  # the request, which used its parent before
        prefix.add(table.cut(table.start + 1).slots[0])
        prefix.keys.append(key)
        self._at[key] = prefix

    def _offer(self, prefix: Prefix) -> None:
        if prefix.children:
            return
        heapq.heappush(self._evictable, (prefix.used, prefix.id))
        if len(self._evictable) > 2 * len(self.prefixes) + MOST_STALE:
            idle = (p for p in self.prefixes.values() if not p.users and not p.children)
            self._evictable = sorted((p.used, p.id) for p in idle)

    def _oldest(self) -> Prefix:
        while True:
            used, number = self._evictable[0]
            prefix = self.prefixes.get(number)
            if prefix and (prefix.used, prefix.users, len(prefix.children)) == (used, 0, 0):
                return prefix
            heapq.heappop(self._evictable)

    def _forget(self, prefix: Prefix, gone: list[Prefix]) -> None:
        """Forget a prefix that nobody uses, and those that continue it; add them to `gone`."""
        for child in list(prefix.children):
            self._forget(self.prefixes[child], gone)
        for key in prefix.keys:
            del self._at[key]
        self.idle -= len(prefix.slots)
        self._detach(prefix)
        gone.append(prefix)

    def _detach(self, prefix: Prefix) -> None:
        del self.prefixes[prefix.id], self._tables[prefix.id]
        parent = prefix.parent
        if parent:
            parent.children.remove(prefix.id)
            if not parent.users:
                self._offer(parent)


def _common(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    """How many rBlocks two prompts have in common."""
    shorter = range(min(len(a), len(b)))
    return bisect.bisect_left(shorter, True, key=lambda at: a[at] != b[at])


def _line(prefix: Prefix | None) -> list[Prefix]:
    """A prefix and all it continues, itself first."""
    line = []
    while prefix:
        line.append(prefix)
        prefix = prefix.parent
    return line
