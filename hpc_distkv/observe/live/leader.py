"""A batch job on rank 0, between its files, the gManager and those who watch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from hpc_distkv.batch.job import Entry, Job
from hpc_distkv.batch.threads import Reader, Writer
from hpc_distkv.comm.abort import last_words
from hpc_distkv.comm.waiter import StallError, nobody
from hpc_distkv.comm.world import World
from hpc_distkv.control.messages.requests import Result, Unfinished
from hpc_distkv.observe.live.watch import Watch
from hpc_distkv.observe.summary.metrics import RankFigures
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.observe.summary.snapshot import ControlState, Numbers
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.rank import RankEngine
from hpc_distkv.ranks.worker import Leader

log = logging.getLogger(__name__)

Item = Entry | BaseException | Result | Unfinished
"""What the writer's thread handles."""
LONGEST_HOLD = 0.25
"""Seconds for which a control round may wait for rows, while nobody has any: other ranks are heard
so often."""
LOOK_INTERVAL = 0.05
"""Seconds between two looks at whether the threads get on, and who watches."""


class JobLeader(Leader):
    """What rank 0 does beside its own work: feed the gManager, keep results, show progress. A
    thread reads the rows, another writes the results, and a third waits for the disk
    (`batch.threads`). The second owns `watch` and the run's record.

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
        self._told = False
        """Whether a later one was logged."""
        self._interrupt = interrupt or Interrupt()
        self.resumed = job.resumed
        """Whether earlier runs have done or begun anything."""
        self.watch = watch
        watch.begin(job)
        self._waiter = engine.comm.waiter
        self._syncer: Writer[Job] = Writer(self._sync)
        self._writer: Writer[Item] = Writer(self._handle, self._after_each)
        self._reader: Reader[Entry] = Reader(
            job.entries(), self._writer.put_bounded, lambda: job.bytes_read
        )
        self.gmanager = engine.gmanager(self._reader)
        self._answered_at = self._looked_at = time.monotonic()
        self._peaks: Numbers = np.zeros(engine.comm.world.instances, np.int64)
        """Most rBlocks in use by instance, as of the control rounds."""
        self._state: ControlState | None = None
        """For those who watch, until the writer takes it."""
        self._watched = True
        """Whether they want to look, as the writer says."""
        self._threads = (self._reader, self._writer, self._syncer)
        """In the order in which they end: each hands something to the next."""
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._stop()
            raise

    def ready(self) -> bool:
        """Whether a control round may be answered. While nobody has a row, and as many as fit may
        come at once, it waits a little."""
        rows = self.gmanager.assignment
        if rows.home or self._reader.waits or rows.unfinished > 0:
            return True
        return time.monotonic() - self._answered_at >= LONGEST_HOLD

    def finish(self, result: Result) -> None:
        """Have a row's answer written."""
        self._writer.put(result)

    def save(self, unfinished: Unfinished) -> None:
        """Keep what was made of a row for the rerun."""
        self._writer.put(unfinished)

    def tick(self) -> None:
        """After every control round: show how far the run is, and end it after a failure. Raises
        StallError if the disk hangs."""
        self._answered_at = now = time.monotonic()
        if (reports := self.gmanager.reports) is not None:
            np.maximum(self._peaks, reports.capacity - reports.free, out=self._peaks)
        if now - self._looked_at >= LOOK_INTERVAL:
            self._looked_at = now
            self._check_threads()
            if self._watched and self._state is None:
                self._state = ControlState.of(self.gmanager)
        if self._failure and not self._interrupt.halt:
            self._interrupt.ask(0, "a failure of rank 0")

    def close(self, ranks: Sequence[RankFigures], world: World, ordered: bool) -> dict[str, Any]:
        """Close the files; the figures of the run. Raises what has ended it."""
        self._stop()
        state = ControlState.of(self.gmanager)
        with self._remembering(Exception):
            if state.reports is not None:
                self.watch.look(self._job, state)
        with self._remembering(Exception):
            self._job.close(ordered)
        with self._remembering(Exception):
            self.watch.close(self._job, state)
        if self._failure:
            raise self._failure
        return self._record.figures(self._job, ranks, world, self._peaks.tolist())

    def release(self) -> None:
        """Let other runs write the files, however this one ended."""
        self._job.stop_reading()
        for thread in self._threads:
            with suppress(StallError):  # then the thread stays, and ends when the disk is back
                thread.stop(self._check_threads)
        self._job.release()

    def _stop(self) -> None:
        """All that was put is handled, and no thread is left. Raises StallError if the disk
        hangs."""
        self._job.stop_reading()
        for thread in self._threads:
            thread.stop(self._check_threads)

    def _check_threads(self) -> None:
        """Raise StallError if a thread has not got on with its work for the stall timeout."""
        job, limit = self._job, self._waiter.stall_timeout
        if self._reader.quiet() > limit:
            raise self._waiter.stall(f"its disk, to read {job.input}", nobody)
        if max(self._writer.quiet(), self._syncer.quiet()) > limit:
            raise self._waiter.stall(f"its disk, to write {job.output}", nobody)

    # -- in the other threads -------------------------------------------------------------------

    def _handle(self, item: Item) -> None:
        with self._remembering():
            match item:
                case Result():
                    if written := self._job.finish(item):
                        self._record.add(*written)
                case Unfinished():
                    self._job.save(item)
                case BaseException():
                    raise item
                case _:
                    self._job.enter(item)

    def _after_each(self) -> None:
        with self._remembering():
            if self._job.write() and self._syncer.began is None:
                self._syncer.put(self._job)
        with self._remembering():
            if state := self._state:
                self._state = None
                self.watch.look(self._job, state)
            self._watched = self.watch.due

    def _sync(self, job: Job) -> None:
        with self._remembering():
            job.sync()

    @contextmanager
    def _remembering(self, kind: type[BaseException] = BaseException) -> Iterator[None]:
        try:
            yield
        except kind as error:
            if self._failure is None:
                self._failure = error
            elif not self._told:
                self._told = True
                log.warning("after this run had failed: %s", last_words(error).rstrip())
