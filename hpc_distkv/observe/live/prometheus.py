"""A run's state for Prometheus, through the node exporter's textfile collector."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.observe.summary.metrics import total
from hpc_distkv.observe.summary.snapshot import Snapshot
from hpc_distkv.regular import replace_file

INTERVAL = 10.0
"""Seconds between two files."""
Samples = Mapping[tuple[str, ...], float]
"""Values of further labels → value."""
COUNTED = {
    "cached_tokens": "Tokens that rows took from rBlocks of others and did not compute again.",
    "preemptions": "Rows preempted by older ones, to be computed again or to go on later.",
    "blocks_lent": "rBlocks received from debtors.",
    "blocks_returned": "rBlocks recalled from creditors.",
    "blocks_to_host": "rBlocks moved or copied to the host's memory.",
    "refused_grants": "Grants beyond what a rank had promised.",
    "bytes_moved": "Bytes of rBlocks sent and received.",
    "bytes_queried": "Bytes of queries sent and partial results returned.",
}
"""Fields of `Counters` that are shown."""


class PrometheusFile(Collector):
    """Rewrites one file, as a whole, every INTERVAL. Counters are those that instances report now
    and then, so they may be seconds old.

    Every sample has the labels of its run, so that jobs that share a node do not collide.
    """

    def __init__(self, path: Path, labels: Mapping[str, str]) -> None:
        self._path, self._labels = path, dict(labels)
        self._registry = CollectorRegistry(auto_describe=False)
        self._started = time.monotonic()
        self._written = float("-inf")
        self._families: list[Metric] = []
        self._registry.register(self)

    @property
    def due(self) -> bool:
        """Whether it is time for another `write`."""
        return time.monotonic() - self._written >= INTERVAL

    def write(self, now: Snapshot, counters: Sequence[Counters], finished: bool = False) -> None:
        """Replace the file. Raises OSError."""
        self._written = time.monotonic()
        self._families = [*self._rows(now, finished), *self._instances(now)]
        summed = total(counters)
        for name, meaning in COUNTED.items():
            self._families.append(self._counter(name, meaning, {(): summed[name]}))
        replace_file(self._path, [generate_latest(self._registry)])

    def collect(self) -> Iterator[Metric]:
        """What `write` was told."""
        yield from self._families

    def _rows(self, now: Snapshot, finished: bool) -> Iterator[Metric]:
        seconds = time.monotonic() - self._started
        results: Samples = {("answered",): now.answered, ("failed",): now.failed}
        yield self._counter("rows", "Rows of this run with a result.", results, ("result",))
        before = "Rows of the input, as far as it was read, that earlier runs had finished."
        yield self._gauge("rows_before", before, now.before)
        yield self._gauge("rows_left", "Rows without a result, estimated.", now.left)
        yield self._gauge("requests_waiting", "Requests that were read and wait.", now.waiting)
        yield self._gauge("progress_ratio", "Part of the input that is done.", now.fraction)
        left = now.seconds_left(seconds)
        if left is not None:
            yield self._gauge("seconds_left", "Until the last row, estimated.", left)
        yield self._gauge("finished", "1 once the run has ended.", float(finished))

    def _instances(self, now: Snapshot) -> Iterator[Metric]:
        aside, owed = -now.hosted, np.zeros_like(now.hosted)
        for debtor, creditor, blocks in now.debts:
            aside[creditor] += blocks
            owed[debtor] += blocks
        for name, meaning, values in (
            ("kv_blocks_used", "rBlocks in use in an instance's pool.", now.used.tolist()),
            ("kv_blocks", "rBlocks in an instance's pool.", now.capacity.tolist()),
            ("kv_blocks_lent_now", "rBlocks that hold KV of others.", now.hosted.tolist()),
            (
                "kv_blocks_set_aside_now",
                "rBlocks granted to others, and empty.",
                np.maximum(aside, 0).tolist(),
            ),
            ("kv_blocks_owed_now", "rBlocks borrowed or set aside at others.", owed.tolist()),
            ("requests_running", "Requests that have KV.", now.running.tolist()),
        ):
            samples: Samples = {(str(instance),): value for instance, value in enumerate(values)}
            yield self._gauge(name, meaning, samples, ("instance",))
        for name, values in (
            ("prompt_tokens", now.prompt_tokens.tolist()),
            ("generated_tokens", now.generated_tokens.tolist()),
        ):
            samples = {(str(instance),): value for instance, value in enumerate(values)}
            meaning = f"{name.replace('_', ' ').capitalize()} computed."
            yield self._counter(name, meaning, samples, ("instance",))

    def _gauge(
        self,
        name: str,
        meaning: str,
        samples: float | Samples,
        labels: tuple[str, ...] = (),
    ) -> Metric:
        family = GaugeMetricFamily(f"hpc_distkv_{name}", meaning, labels=(*self._labels, *labels))
        return self._filled(family, samples)

    def _counter(
        self,
        name: str,
        meaning: str,
        samples: Samples,
        labels: tuple[str, ...] = (),
    ) -> Metric:
        names = (*self._labels, *labels)
        family = CounterMetricFamily(f"hpc_distkv_{name}", meaning, labels=names)
        return self._filled(family, samples)

    def _filled(
        self,
        family: GaugeMetricFamily | CounterMetricFamily,
        samples: float | Samples,
    ) -> Metric:
        if not isinstance(samples, Mapping):
            samples = {(): samples}
        for labels, value in samples.items():
            family.add_metric([*self._labels.values(), *labels], value)
        return family


def run_labels(output: Path) -> dict[str, str]:
    """What tells this run from others on the same node: its results file, and Slurm's job."""
    job = os.environ.get("SLURM_JOB_ID", "")
    name = str(output.resolve()).encode(errors="backslashreplace").decode()
    return {"output": name, "slurm_job_id": job}
