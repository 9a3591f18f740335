"""A batch job on rank 0, between its files, the gManager and those who watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hpc_distkv.batch.job import Job
from hpc_distkv.comm.world import World
from hpc_distkv.control.assign.source import SyncSource
from hpc_distkv.control.messages.requests import Request, Result, Unfinished
from hpc_distkv.observe.live.watch import Watch
from hpc_distkv.observe.summary.metrics import RankFigures
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.rank import RankEngine


class JobLeader:
    """What rank 0 does beside its own work: feed the gManager, keep results, show progress.

    Whatever goes wrong in that, as a full disk, is remembered and ends the run on all ranks as an
    interrupt does, since the others count on this one to go on until then. What can still be kept
    of the rows is kept, and `close` raises what came first.
    """

    def __init__(
        self, engine: RankEngine, job: Job, watch: Watch, interrupt: Interrupt | None = None
    ) -> None:
        """`interrupt`: of the run, through which it is ended."""
        self._job = job
        self._record = RunRecord()
        self._failure: Exception | None = None
        self._interrupt = interrupt or Interrupt()
        self.resumed = job.resumed
        """Whether earlier runs have done or begun anything."""
        self.watch = watch
        watch.begin(job)
        self.gmanager = engine.gmanager(SyncSource(self._requests()))

    def finish(self, result: Result) -> None:
        """Write a row's answer."""
        with self._remembering():
            if written := self._job.finish(result):
                self._record.add(*written)

    def save(self, unfinished: Unfinished) -> None:
        """Keep what was made of a row for the rerun."""
        with self._remembering():
            self._job.save(unfinished)

    def tick(self) -> None:
        """After every control round: make results durable and show how far the run is."""
        with self._remembering():
            self._job.commit()
            if (reports := self.gmanager.reports) is not None:
                self._record.see_pools(reports.capacity - reports.free)
            self.watch.look(self._job, self.gmanager)

    def close(self, ranks: Sequence[RankFigures], world: World, ordered: bool) -> dict[str, Any]:
        """Close the files; the figures of the run. Raises what has ended it."""
        with self._remembering():
            self._job.close(ordered)
        with self._remembering():
            self.watch.close(self._job, self.gmanager)
        if self._failure:
            raise self._failure
        return self._record.figures(self._job, ranks, world)

    def release(self) -> None:
        """Let other runs write the files, however this one ended."""
        self._job.release()

    def _requests(self) -> Iterator[Request]:
        """Of the job, until that fails."""
        with self._remembering():
            yield from self._job.requests()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error
            self._interrupt.ask(0, "a failure of rank 0")
