"""What a run looks like at one moment, and how it went: a bounded number of such moments."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.batch.job import Job
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Reports

Numbers = NDArray[np.int64]


class Snapshot(NamedTuple):
    """Seen from rank 0. Arrays have one value per instance, as of its last report."""

    at: float
    """By `time.perf_counter`."""
    answered: int
    """Rows of this run, like `failed`."""
    failed: int
    before: int
    """Rows of the input read so far that had their line before this run."""
    failed_before: int
    """Error rows that the results held before this run."""
    left: float
    """Rows without a line."""
    estimated: bool
    """Whether `left` is: the input has not been read to its end."""
    least_seconds: float
    """That some instance needs for the rows it has, if all their tokens were as fast as those of
    prompts."""
    waiting: int
    """Requests that were read, and neither run nor are finished."""
    running: Numbers
    prompt_tokens: Numbers
    """Computed so far, recomputed ones included."""
    generated_tokens: Numbers
    used: Numbers
    """rBlocks."""
    hosted: Numbers
    """Those of them that are lent: they hold KV of others."""
    capacity: Numbers
    debts: list[tuple[int, int, int]]
    """(debtor, creditor, rBlocks lent or set aside)."""

    @property
    def rows(self) -> int:
        """Rows with a line in the results."""
        return self.answered + self.failed + self.before

    @property
    def fraction(self) -> float:
        """Part of the input that is behind us, 0 to 1."""
        return self.rows / (self.rows + self.left) if self.rows + self.left else 1.0

    @property
    def errors(self) -> int:
        """Error rows in the results."""
        return self.failed + self.failed_before

    @property
    def lent(self) -> int:
        """rBlocks that hold KV of others; what is only set aside for them does not count."""
        return int(self.hosted.sum())

    @property
    def pool_use(self) -> float:
        """Part of all rBlocks in use, 0 to 1."""
        return float(self.used.sum() / max(1, self.capacity.sum()))

    def seconds_left(self, seconds: float) -> float | None:
        """If rows go on to end as in the `seconds` of this run so far, but no less than the work
        begun takes: the last rows may be the longest. None: no row has ended."""
        done = self.answered + self.failed
        return max(self.left * seconds / done, self.least_seconds) if done else None


class ControlState(NamedTuple):
    """What the gManager knows after a control round; it changes no more."""

    reports: Reports | None
    """Of the round."""
    draining: bool
    waiting: int
    debts: list[tuple[int, int, int]]
    """Both as in `Snapshot`."""
    counters: list[Counters]
    """By instance."""

    @classmethod
    def of(cls, manager: GManager) -> ControlState:
        """What it knows now."""
        return cls(
            manager.reports,
            manager.draining,
            max(0, manager.assignment.unfinished - manager.running),
            list(manager.ledger.pairs()),
            list(manager.counters),
        )


def take_snapshot(job: Job, state: ControlState) -> Snapshot:
    """How far the job is now, by its own books and the last control round's reports."""
    reports = state.reports
    assert reports is not None
    return Snapshot(
        at=time.perf_counter(),
        answered=job.answered,
        failed=job.failed,
        before=job.skipped,
        failed_before=job.failed_before,
        left=_rows_left(job),
        estimated=job.total_rows is None,
        least_seconds=float((reports.work_left * reports.prompt_time).max()),
        waiting=state.waiting,
        running=reports.running,
        prompt_tokens=reports.prompt_tokens,
        generated_tokens=reports.generated_tokens,
        used=reports.capacity - reports.free,
        hosted=reports.hosted,
        capacity=reports.capacity,
        debts=state.debts,
    )


def _rows_left(job: Job) -> float:
    behind = job.answered + job.failed + job.skipped
    if job.total_rows is not None:
        return job.total_rows - behind
    read = behind + job.in_flight
    unread = job.input_bytes - job.bytes_read
    return job.in_flight + read * unread / max(1, job.bytes_read)


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
