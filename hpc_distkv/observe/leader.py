"""A batch job on rank 0, between its files, the gManager and those who watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_distkv.batch.job import Job
from hpc_distkv.comm.world import World
from hpc_distkv.control.requests import Result, Unfinished
from hpc_distkv.engine.rank import RankEngine
from hpc_distkv.observe.metrics import RankFigures
from hpc_distkv.observe.run import RunRecord
from hpc_distkv.observe.watch import Watch

READ_SECONDS = 0.25
"""For which rank 0 reads and tokenizes rows in one control round: meanwhile it serves nobody."""


class JobLeader:
    """What rank 0 does beside its own work: feed the gManager, keep results, show progress."""

    def __init__(self, engine: RankEngine, job: Job, watch: Watch) -> None:
        self.gmanager = engine.gmanager(job.requests(pause=READ_SECONDS))
        self.watch = watch
        self._job = job
        self._record = RunRecord()
        watch.begin(job)

    def finish(self, result: Result) -> None:
        """Write a row's answer."""
        if written := self._job.finish(result):
            self._record.add(*written)

    def put_aside(self, unfinished: Unfinished) -> None:
        """Keep what was made of a row for the rerun."""
        self._job.put_aside(unfinished)

    def tick(self) -> None:
        """After every control round: make results durable and show how far the run is."""
        self._job.commit()
        if (reports := self.gmanager.reports) is not None:
            self._record.see_pools(reports["capacity"] - reports["free"])
        self.watch.look(self._job, self.gmanager)

    def close(self, ranks: Sequence[RankFigures], world: World, ordered: bool) -> dict[str, Any]:
        """Close the files; the figures of the run."""
        self._job.close(ordered)
        self.watch.close(self._job, self.gmanager)
        return self._record.figures(self._job, ranks, world)
