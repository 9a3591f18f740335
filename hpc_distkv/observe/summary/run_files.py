"""Reads back what runs wrote: their metrics and traces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_distkv.errors import UserError
from hpc_distkv.observe.summary.earlier import SUFFIXES, UNREADABLE, opened, read_figures
from hpc_distkv.observe.summary.legs import merged
from hpc_distkv.observe.summary.run_schema import as_about, as_metrics
from hpc_distkv.observe.trace.trace_names import (
    FIRST_PROCESS,
    HOSTED,
    OWES,
    OWN,
    POOL,
    ROWS,
    TOKENS,
)

Series = NDArray[np.float64]


class RunFileError(UserError):
    """A file is not what a run writes; the text says which, and what to do."""


@dataclass(frozen=True)
class History:
    """A run over time, from the counters of its trace. Arrays are [samples] or [instances,
    samples]."""

    seconds: Series
    """Of the samples, since the first one."""
    own: Series
    """rBlocks that an instance uses for its own requests, and ..."""
    hosted: Series
    """... for those of others."""
    capacity: Series
    """rBlocks [instances]."""
    running: Series
    prompt_tokens: Series
    """So far."""
    generated_tokens: Series
    debts: list[dict[tuple[int, int], int]]
    """By sample: (debtor, creditor) → rBlocks."""

    @property
    def instances(self) -> int:
        """How many."""
        return len(self.own)


@dataclass
class RunFiles:
    """What there is of the runs of a job, or of an array: metrics, traces or both."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    """The metrics of each, in the order of time."""
    traces: list[tuple[dict[str, Any], Path]] = field(default_factory=list)
    """What each run was, and its trace, likewise."""
    history: History | None = None
    """Of the last run that has a trace."""
    names: list[str] = field(default_factory=list)
    """Of the files."""
    left_out: list[str] = field(default_factory=list)
    """Files of runs whose answers were dropped."""
    unread: list[str] = field(default_factory=list)
    """Why files of a folder were passed over that may be of a run."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Those of all runs together; empty if there are none."""
        return merged(self.runs) if self.runs else {}

    @property
    def about(self) -> dict[str, Any]:
        """What the last run was."""
        return about_run(self.runs[-1]) if self.runs else self.traces[-1][0]


def about_run(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the run was."""
    about: dict[str, Any] = metrics.get("job", {})
    return about


def read_run(paths: Sequence[Path]) -> RunFiles:
    """Read the metrics and traces of the runs of a job, or of all shards of an array, told apart by
    what they hold; a folder stands for all such files in it. Raises RunFileError."""
    run = RunFiles()
    found = list(_find(paths, run.unread))
    if not found:
        listed = ", ".join(map(str, paths))
        raise RunFileError(
            f"no metrics or trace in {listed}: `generate` writes them with --metrics and --trace"
            + "".join(f"; {why}" for why in run.unread)
        )
    found.sort(key=lambda each: str(each.about.get("started", "")))
    _check(found)
    for each in found:
        if each.dropped(found):
            run.left_out.append(each.path.name)
            continue
        run.names.append(each.path.name)
        if each.metrics is None:
            run.traces.append((each.about, each.path))
        else:
            run.runs.append(each.metrics)
    if run.traces:
        path = run.traces[-1][1]
        run.history = _history(path, _read(path))
    return run


class Found(NamedTuple):
    """A file of a run."""

    path: Path
    about: dict[str, Any]
    metrics: dict[str, Any] | None
    """None: it is a trace."""

    @property
    def output(self) -> Any:
        """The results of its job."""
        return self.about.get("output")

    @property
    def input(self) -> Any:
        """The batch file."""
        return self.about.get("input")

    def dropped(self, others: Sequence[Found]) -> bool:
        """Whether a later run has started the job anew."""
        began = str(self.about.get("started", ""))
        return any(
            other.output == self.output
            and other.about.get("resumed") is False
            and str(other.about.get("started", "")) > began
            for other in others
        )


def _find(paths: Sequence[Path], unread: list[str]) -> Iterator[Found]:
    """The files of runs. Whatever else is in a folder is passed over, if it cannot be read with a
    word in `unread`. Raises RunFileError for a file that is given by name."""
    for path in files_of(paths):
        try:
            if found := _look(path):
                yield found
            elif path in paths:
                raise RunFileError(f"{path} is neither a metrics file nor a trace of `generate`")
        except RunFileError as error:
            if path in paths:
                raise
            unread.append(str(error))


def _look(path: Path) -> Found | None:
    """What a file holds, if it is one of a run. Raises RunFileError."""
    try:
        content = read_figures(path)
        other = content.get("otherData")
        if isinstance(other, dict) and "format" in other:
            return Found(path, as_about(other), None)
        if "request_counts" not in content:
            return None
        metrics = as_metrics(content)
    except msgspec.ValidationError as error:
        raise RunFileError(f"{path}: another version wrote it, or no run ({error})") from error
    except UNREADABLE as error:
        raise RunFileError(f"cannot read {path}: {error}") from error
    return Found(path, about_run(metrics), metrics)


def _check(found: Sequence[Found]) -> None:
    """Whether they are of the runs of one job, or of the shards of one input, each once."""
    first, seen = found[0], set[tuple[Any, ...]]()
    for each in found:
        kind = "trace" if each.metrics is None else "file of metrics"
        key = (kind, each.output, each.about.get("started"))
        if key in seen:
            raise RunFileError(f"{each.path} is a second {kind} of one run: name each once")
        seen.add(key)
        if None in (each.output, first.output) or each.output == first.output:
            continue
        counts = [str(one.about.get("shard")).partition("/")[2] for one in (first, each)]
        if not counts[0] or len({*counts}) > 1 or first.input != each.input:
            raise RunFileError(
                f"{each.path} is of another job than {first.path}: name the files of one job, or "
                "of the shards of one"
            )


def files_of(paths: Iterable[Path]) -> Iterable[Path]:
    """What `read_run` looks at."""
    for path in paths:
        if path.is_dir():
            try:
                yield from sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
            except OSError as error:
                raise RunFileError(f"cannot read {path}: {error.strerror}") from error
        else:
            yield path


def _read(path: Path) -> dict[str, Any]:
    try:
        with opened(path) as file:
            content = json.load(file)
    except UNREADABLE as error:
        raise RunFileError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}


def _history(path: Path, content: dict[str, Any]) -> History | None:
    """The counters of a trace as arrays; None if it has fewer than two samples."""
    try:
        tp = int(content["otherData"]["tensor_parallel_size"])
        events = [event for event in content["traceEvents"] if event["ph"] == "C"]
        moments = sorted({event["ts"] for event in events})
        instance_of = [(event["pid"] - FIRST_PROCESS) // tp for event in events]
        if min(instance_of, default=0) < 0:
            raise ValueError("a process id below that of rank 0")
        instances = 1 + max(instance_of, default=0)
        if len(moments) < 2:
            return None
        place = {moment: index for index, moment in enumerate(moments)}
        columns = {
            (name, key): np.zeros((instances, len(moments)))
            for name, keys in (
                (POOL, (OWN, HOSTED, "free")),
                (ROWS, ("running",)),
                (TOKENS, ("prompt", "generated")),
            )
            for key in keys
        }
        debts: list[dict[tuple[int, int], int]] = [{} for _ in moments]
        for instance, event in zip(instance_of, events, strict=True):
            at = place[event["ts"]]
            for key, value in event["args"].items():
                if event["name"] != OWES:
                    columns[event["name"], key][instance, at] = value
                elif value:
                    debts[at][instance, int(key.removeprefix("instance "))] = value
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunFileError(f"{path} is no trace of `generate`: {error!r}") from error
    pool = columns[POOL, OWN] + columns[POOL, HOSTED] + columns[POOL, "free"]
    seconds = np.array(moments) / 1e6
    return History(
        seconds=seconds - seconds[0],
        own=columns[POOL, OWN],
        hosted=columns[POOL, HOSTED],
        capacity=pool.max(axis=1),
        running=columns[ROWS, "running"],
        prompt_tokens=columns[TOKENS, "prompt"],
        generated_tokens=columns[TOKENS, "generated"],
        debts=debts,
    )
