"""A batch job on rank 0, between its files, the gManager and those who watch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hpc_distkv.batch.job import Entry, Job
from hpc_distkv.batch.threads import Reader, Writer
from hpc_distkv.comm.world import World
from hpc_distkv.control.messages.requests import Result, Unfinished
from hpc_distkv.observe.live.watch import Watch
from hpc_distkv.observe.summary.metrics import RankFigures
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.observe.summary.snapshot import ControlState
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.rank import RankEngine

Item = Entry | BaseException | Result | Unfinished | ControlState
"""What the writer's thread handles."""
LONGEST_HOLD = 0.25
"""Seconds for which a control round may wait for rows, while nobody has any: other ranks are heard
so often."""
LOOK_INTERVAL = 0.05
"""Seconds between two looks at how far the run is."""


class JobLeader:
    """What rank 0 does beside its own work: feed the gManager, keep results, show progress. A
    thread reads the rows and another writes the results (`batch.threads`); the latter owns `watch`
    and the run's record, of which the peaks of the pools are noted here.

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
        self._failure: BaseException | None = None
        self._interrupt = interrupt or Interrupt()
        self.resumed = job.resumed
        """Whether earlier runs have done or begun anything."""
        self.watch = watch
        watch.begin(job)
        self._writer: Writer[Item] = Writer(self._handle, self._commit)
        self._reader: Reader[Entry] = Reader(job.entries(), self._writer.put_in_turn)
        self.gmanager = engine.gmanager(self._reader)
        self._answered_at = self._looked_at = time.monotonic()
        self._writer.start()
        self._reader.start()

    def ready(self) -> bool:
        """Whether a control round may be answered. While nobody has a row, and as many as fit may
        come at once, it waits a little."""
        rows, held = self.gmanager.assignment, time.monotonic() - self._answered_at
        return bool(rows.home) or self._reader.waits or rows.unfinished > 0 or held >= LONGEST_HOLD

    def finish(self, result: Result) -> None:
        """Have a row's answer written."""
        self._writer.put(result)

    def save(self, unfinished: Unfinished) -> None:
        """Keep what was made of a row for the rerun."""
        self._writer.put(unfinished)

    def tick(self) -> None:
        """After every control round: show how far the run is, and end it after a failure."""
        self._answered_at = now = time.monotonic()
        if (reports := self.gmanager.reports) is not None:
            self._record.see_pools(reports.capacity - reports.free)
        if now - self._looked_at >= LOOK_INTERVAL:
            self._looked_at = now
            self._writer.put(ControlState.of(self.gmanager))
        if self._failure and not self._interrupt.halt:
            self._interrupt.ask(0, "a failure of rank 0")

    def close(self, ranks: Sequence[RankFigures], world: World, ordered: bool) -> dict[str, Any]:
        """Close the files; the figures of the run. Raises what has ended it."""
        state = ControlState.of(self.gmanager)
        if state.reports is not None:
            self._writer.put(state)
        self._stop()
        with self._remembering(Exception):
            self._job.close(ordered)
        with self._remembering(Exception):
            self.watch.close(self._job, state)
        if self._failure:
            raise self._failure
        return self._record.figures(self._job, ranks, world)

    def release(self) -> None:
        """Let other runs write the files, however this one ended."""
        self._stop()
        self._job.release()

    def _stop(self) -> None:
        """All that was put is handled, and no thread is left."""
        self._job.stop_reading()
        self._reader.stop()
        self._writer.stop()

    # -- in the writer's thread -----------------------------------------------------------------

    def _handle(self, item: Item) -> None:
        with self._remembering():
            match item:
                case Result():
                    if written := self._job.finish(item):
                        self._record.add(*written)
                case Unfinished():
                    self._job.save(item)
                case ControlState():
                    self.watch.look(self._job, item)
                case BaseException():
                    raise item
                case _:
                    self._job.enter(item)

    def _commit(self) -> None:
        with self._remembering():
            self._job.commit()

    @contextmanager
    def _remembering(self, kind: type[BaseException] = BaseException) -> Iterator[None]:
        try:
            yield
        except kind as error:
            self._failure = self._failure or error
