"""Reads back what a run wrote: its metrics and its trace."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.errors import UserError
from hpc_distkv.observe.trace_names import FIRST_PROCESS, HOSTED, OWES, OWN, POOL, ROWS, TOKENS
from hpc_distkv.regular import read_regular

Series = NDArray[np.float64]
SUFFIXES = (".json", ".json.gz")
NEEDED = (
    *("request_counts", "seconds", "prompt_tokens", "output_tokens", "output_tokens_per_second"),
    *("tokens_per_second", "time_to_first_token_s", "between_tokens_s", "latency_s"),
    *("histograms", "counters", "ranks", "slowest_rows"),
)
"""What a metrics file has."""


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
    """What there is of one run: metrics, trace or both."""

    metrics: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """What the job was."""
    history: History | None = None
    names: list[str] = field(default_factory=list)
    """Of the files."""


def read_run(paths: Sequence[Path]) -> RunFiles:
    """Read the metrics and the trace file of a run, told apart by what they hold; a folder stands
    for all such files in it. Raises RunFileError."""
    run = RunFiles()
    for path in files_of(paths):
        content = _read(path)
        if "traceEvents" in content and "format" in content.get("otherData", {}):
            if run.history:
                raise RunFileError(f"{path} is a second trace: name the files of one run")
            run.about = run.about or content["otherData"]
            run.history = _history(path, content)
        elif "request_counts" in content:
            if run.metrics:
                raise RunFileError(f"{path} is a second file of metrics: name those of one run")
            if missing := [name for name in NEEDED if name not in content]:
                raise RunFileError(f"{path} has no {', '.join(missing)}: another version wrote it")
            run.metrics, run.about = content, content.get("job", {})
        elif path not in paths:
            continue
        else:
            raise RunFileError(f"{path} is neither a metrics file nor a trace of `generate`")
        run.names.append(path.name)
    if not run.names:
        listed = ", ".join(map(str, paths))
        raise RunFileError(
            f"no metrics or trace in {listed}: `generate` writes them with --metrics and --trace"
        )
    return run


def files_of(paths: Iterable[Path]) -> Iterable[Path]:
    """What `read_run` looks at."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        else:
            yield path


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_regular(path)
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        content = json.loads(text)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
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
