"""Waiting for mail, as tests like it: a message of each of some peers."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from hpc_distkv.comm.transport import Comm, Mail

KEPT: WeakKeyDictionary[Mail, dict[int, deque[bytes]]] = WeakKeyDictionary()
"""Messages that came before anybody asked for them, by sender."""


def take(comm: Comm, peers: Sequence[int], what: str) -> dict[int, bytes]:
    """The next message of each of `peers`."""
    kept = KEPT.setdefault(comm.mail, defaultdict(deque))

    def all_there() -> bool | None:
        while (letter := comm.mail.poll()) is not None:
            kept[letter[0]].append(letter[1])
        return all(kept[peer] for peer in peers) or None

    if not all_there():
        comm.waiter.until(all_there, what, lambda: [p for p in peers if not kept[p]])
    return {peer: kept[peer].popleft() for peer in peers}
