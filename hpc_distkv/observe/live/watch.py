"""Who is shown how a run goes on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hpc_distkv.batch.job import Job
from hpc_distkv.observe.live.progress import ProgressReport
from hpc_distkv.observe.live.prometheus import PrometheusFile
from hpc_distkv.observe.live.story import Story
from hpc_distkv.observe.summary.snapshot import ControlState, Snapshot, Timeline, take_snapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """The onlookers of a run, on rank 0; each says how often it wants to look."""

    progress: ProgressReport | None = None
    prometheus: PrometheusFile | None = None
    timeline: Timeline | None = None
    story: Story | None = None

    def begin(self, job: Job) -> None:
        """The run begins."""
        if self.progress:
            self.progress.begin()
        if self.story:
            self.story.begin(job)

    @property
    def due(self) -> bool:
        """Whether somebody wants to look."""
        return bool(self.story and self.story.due) or self._shows

    def look(self, job: Job, state: ControlState) -> None:
        """After a control round."""
        if self.story:
            self.story.look(job, state)
        if self._shows:
            self._show(take_snapshot(job, state), state)

    def close(self, job: Job, state: ControlState) -> None:
        """The run is over."""
        if self.progress:
            self.progress.close()
        if state.reports is None:
            return
        last = take_snapshot(job, state)
        if self.prometheus:
            self._write(self.prometheus, last, state, finished=True)
        if self.timeline:
            self.timeline.add(last)

    @property
    def _shows(self) -> bool:
        onlookers = (self.progress, self.prometheus, self.timeline)
        return any(onlooker is not None and onlooker.due for onlooker in onlookers)

    def _show(self, now: Snapshot, state: ControlState) -> None:
        if self.progress and self.progress.due:
            self.progress.show(now)
        if self.prometheus and self.prometheus.due:
            self._write(self.prometheus, now, state)
        if self.timeline and self.timeline.due:
            self.timeline.add(now)

    def _write(
        self, file: PrometheusFile, now: Snapshot, state: ControlState, finished: bool = False
    ) -> None:
        """No job ends because nobody can see it."""
        try:
            file.write(now, state.counters, finished)
        except OSError as error:
            log.warning("cannot write the file for Prometheus: %s", error)
