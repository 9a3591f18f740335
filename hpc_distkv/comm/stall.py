"""One message for a job that hangs: which rank does not answer, and what of it others wait for."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from hpc_distkv.comm.transport import Comm, Mail
from hpc_distkv.comm.waiter import StallError

HEARING = 2.0
"""Seconds in which rank 0 hears the others: all waits for a hung rank run out at about the same
time."""
UNHEARD = 5.0
"""Seconds after which a rank speaks for itself, if rank 0 has not ended the job."""
APART = 0.2
"""Seconds between those who speak for themselves: the first one ends the job."""
MOST_TOLD = 6
"""Ranks, and waits, that the message tells of."""
PAUSE = 0.01


class Complaint(msgspec.Struct, frozen=True, array_like=True):
    """A wait that ran out."""

    rank: int
    awaited: tuple[int, ...]
    text: str


def agreed_words(comm: Comm, stall: StallError) -> str:
    """What to say of a stall. Rank 0 hears the ranks whose waits have run out too, and speaks for
    all; the others leave it time to end the job, and otherwise speak for themselves."""
    own = Complaint(comm.world.rank, stall.awaited, str(stall))
    mail = comm.complaints
    if mail is None:
        return own.text
    if comm.world.rank == 0:
        return verdict(comm, [own, *_hear(mail)])
    mail.post(0, msgspec.msgpack.encode(own))
    limit = time.monotonic() + UNHEARD + APART * comm.world.rank
    while time.monotonic() < limit:
        mail.drained()
        time.sleep(PAUSE)
    return own.text


def verdict(comm: Comm, complaints: Iterable[Complaint]) -> str:
    """Who is awaited and does not wait itself: those ranks hang, or compute for too long."""
    told = {complaint.rank: complaint for complaint in complaints}
    silent = sorted({rank for c in told.values() for rank in c.awaited} - told.keys())
    waits = [c.text for _, c in sorted(told.items()) if not silent or set(silent) & set(c.awaited)]
    if not silent and len(waits) == 1:
        return waits[0]
    if not silent:
        return "\n".join(["all of these wait for each other:", *_some(waits)])
    names = _some([comm.world.name(rank) for rank in silent])
    known = [f"{comm.world.name(rank)}: {words}" for rank in silent if (words := comm.heard(rank))]
    return "\n".join([f"no answer from {', '.join(names)}", *_some(known), *_some(waits)])


def _some(words: list[str]) -> list[str]:
    """Not more of them than anybody would read."""
    rest = len(words) - MOST_TOLD
    return [*words[:MOST_TOLD], f"and {rest} more"] if rest > 0 else words


def _hear(mail: Mail) -> list[Complaint]:
    heard = []
    limit = time.monotonic() + HEARING
    while time.monotonic() < limit:
        while (message := mail.poll()) is not None:
            heard.append(msgspec.msgpack.decode(message[1], type=Complaint))
        time.sleep(PAUSE)
    return heard
