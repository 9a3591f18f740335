"""How the clocks of ranks relate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from hpc_distkv.comm.transport import Comm

ROUND_TRIPS = 10
"""With every rank: the fastest counts."""

Now = Callable[[], float]


class ClockOffset(NamedTuple):
    """What this rank's clock shows more than rank 0's, measured once. In seconds."""

    at: float
    """When, by this rank's clock."""
    seconds: float
    error: float
    """At most, either way: half of the fastest round trip."""


def measure_clock(comm: Comm, now: Now = time.perf_counter) -> ClockOffset:
    """Compare this rank's clock `now` with rank 0's. Collective; nothing else may be under way.
    Raises StallError.

    Cristian's method: rank 0 asks, the other answers with its time, and of several round trips the
    fastest counts; its middle is taken for the moment of the answer.

        rank 0:   for every other rank in turn: (ask → await its time) × ROUND_TRIPS, send verdict
        others:   (await the question → send the time) × ROUND_TRIPS, await the verdict

    Why it cannot deadlock: rank 0 waits for one rank at a time, and that one, whatever it did
    before, gets to its own part without waiting for anybody but rank 0.
    """
    if comm.world.rank:
        return _answer(comm, now)
    for rank in range(1, comm.world.size):
        _ask(comm, rank, now)
    return ClockOffset(now(), 0.0, 0.0)


def _ask(comm: Comm, rank: int, now: Now) -> None:
    what = f"clock of rank {rank}"
    message = torch.zeros(1, dtype=torch.float64)
    best = (float("inf"), 0.0)
    for _ in range(ROUND_TRIPS):
        asked = now()
        comm.transport.exchange([(rank, message)], []).wait(what)
        comm.transport.exchange([], [(rank, message)]).wait(what)
        took = now() - asked
        best = min(best, (took, message.item() - (asked + took / 2)))
    verdict = torch.tensor([best[1], best[0] / 2], dtype=torch.float64)
    comm.transport.exchange([(rank, verdict)], []).wait(what)


def _answer(comm: Comm, now: Now) -> ClockOffset:
    what = "clock of rank 0"
    message, verdict = torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(ROUND_TRIPS):
        comm.transport.exchange([], [(0, message)]).wait(what)
        message[0] = now()
        comm.transport.exchange([(0, message)], []).wait(what)
    comm.transport.exchange([], [(0, verdict)]).wait(what)
    seconds, error = verdict.tolist()
    return ClockOffset(now(), seconds, error)
