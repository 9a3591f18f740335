"""How a run went, as a bounded number of snapshots."""

from __future__ import annotations

import time

from hpc_distkv.observe.summary.snapshot import Snapshot

SHORTEST = 0.1
"""Seconds between two snapshots at first."""
MOST_NUMBERS = 200_000
"""Snapshots × instances that are kept."""
MOST, LEAST = 2000, 100
"""Snapshots that are kept at most, however few instances there are, and at least."""


class Timeline:
    """Owner of a run's snapshots. When there are too many, every other one is dropped, and from
    then on they are taken as rarely as those that are left: so they cover the whole run, evenly."""

    def __init__(self, instances: int) -> None:
        self.snapshots: list[Snapshot] = []
        self._most = max(LEAST, min(MOST, MOST_NUMBERS // instances))
        self._interval = SHORTEST

    @property
    def due(self) -> bool:
        """Whether it is time for another one."""
        last = self.snapshots[-1].at if self.snapshots else float("-inf")
        return time.perf_counter() - last >= self._interval

    def add(self, snapshot: Snapshot) -> None:
        """One more, later than all others."""
        self.snapshots.append(snapshot)
        if len(self.snapshots) > self._most:
            kept = self.snapshots = self.snapshots[::2]
            self._interval = (kept[-1].at - kept[0].at) / (len(kept) - 1)
