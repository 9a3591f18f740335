"""What happens to a run, told to whoever reads its log: one line for each event."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hpc_distkv.batch.job import Job
from hpc_distkv.comm.world import World
from hpc_distkv.observe.summary.snapshot import ControlState
from hpc_distkv.ranks.interrupt import Asked, Interrupt
from hpc_distkv.units import short

INTERVAL = 0.25
"""Seconds between two looks."""
NOTHING_NEW = "beginning nothing new"


class Story:
    """On rank 0. Owner of what was told already."""

    def __init__(self, tell: Callable[[str], None], world: World, interrupt: Interrupt) -> None:
        """`tell`: prints a line; `interrupt`: of rank 0."""
        self._tell, self._world, self._interrupt = tell, world, interrupt
        self._asked: set[Asked] = set()
        """What was asked of rank 0."""
        self._read = self._draining = False
        self._looked_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another `look`."""
        return time.monotonic() - self._looked_at >= INTERVAL

    def begin(self, job: Job) -> None:
        """How much of the job earlier runs have done."""
        before = job.answered_before + job.failed_before
        parts = [f"{short(job.input_bytes)} bytes of input"]
        if before:
            parts.append(f"{before:,} rows were done before, {job.failed_before:,} of them errors")
        else:
            parts.append("no row was done before")
        if job.begun_rows:
            parts.append(
                f"{job.begun_rows:,} rows were begun, with {job.begun_tokens:,} output tokens"
            )
        self._tell("; ".join(parts))

    def look(self, job: Job, state: ControlState) -> None:
        """After a control round: what is new."""
        self._looked_at = time.monotonic()
        if not self._read and job.total_rows is not None:
            self._read = True
            self._tell(
                f"all {job.total_rows:,} rows of the input are read, "
                f"and {job.in_flight:,} of them are left"
            )
        for asked in dict.fromkeys(self._interrupt.asked):
            if asked in self._asked:
                continue
            self._asked.add(asked)
            self._tell(
                f"{asked.by or 'asked to stop'}: {NOTHING_NEW}, {asked.grace:g} s for what runs"
            )
        if state.draining and not self._draining:
            self._draining = True
            if not self._asked:
                self._tell(f"{self._who(state)} was asked to stop: {NOTHING_NEW}")

    def _who(self, state: ControlState) -> str:
        """The first rank that wants the run to end, as far as its report says so."""
        assert state.reports is not None
        asking = np.flatnonzero(state.reports.drain).tolist()
        return self._world.name(asking[0] * self._world.tp) if asking else "another rank"
