"""Traces of all ranks and rank 0's timeline as one file in the Trace Event Format, which Perfetto
(https://ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from hpc_distkv.comm.world import World
from hpc_distkv.observe.summary.snapshot import Snapshot
from hpc_distkv.observe.trace.spans import FINE_EVERY, WINDOWS, RankSpans
from hpc_distkv.observe.trace.trace_names import (
    DEBTOR_STEPS,
    DETAILS,
    FIRST_PROCESS,
    FREE,
    HOSTED,
    NAMES,
    OWES,
    OWN,
    POOL,
    ROWS,
    TOKENS,
    TRACKS,
    WORK,
)
from hpc_distkv.regular import replacing
from hpc_distkv.step.timesheet import Kind

Event = dict[str, Any]


def write_trace(
    path: Path,
    world: World,
    ranks: Sequence[RankSpans],
    timeline: Sequence[Snapshot],
    origin: float,
    about: dict[str, Any],
) -> None:
    """Replace `path`, compressed if it ends in .gz. `origin`: of the spans' times, by rank 0's
    clock; `about`: what else there is to say of the run. Raises OSError."""
    other = about | {
        "format": "hpc-distkv trace 1",
        "tensor_parallel_size": world.tp,
        "windows_per_second": WINDOWS,
        "one_window_kept_of": [rank.stride for rank in ranks],
        "layers_in_one_window_of": [rank.stride * FINE_EVERY for rank in ranks],
        "clock_error_us": [round(1e6 * rank.clock_error, 1) for rank in ranks],
    }
    with replacing(path) as fresh, _packed(fresh, path) as file:
        head = f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(other)},\n"traceEvents": [\n'
        file.write(head.encode())
        separator = ""
        for event in _events(world, ranks, timeline, origin):
            file.write(f"{separator}{json.dumps(event)}".encode())
            separator = ",\n"
        file.write(b"\n]}\n")


def _packed(file: BinaryIO, path: Path) -> AbstractContextManager[BinaryIO | gzip.GzipFile]:
    if path.suffix == ".gz":
        return gzip.GzipFile(filename="", mode="wb", compresslevel=5, fileobj=file)
    return nullcontext(file)


def _events(
    world: World, ranks: Sequence[RankSpans], timeline: Sequence[Snapshot], origin: float
) -> Iterator[Event]:
    for number, rank in enumerate(ranks):
        yield from _names(world, number, rank)
        for kind, started, ended, one, other in rank.spans.tolist():
            yield _span(FIRST_PROCESS + number, Kind(kind), started, ended, one, other)
    borrowers = {debtor for snapshot in timeline for debtor, _, _ in snapshot.debts}
    for snapshot in timeline:
        yield from _counters(snapshot, origin, world.tp, borrowers)


def _names(world: World, number: int, rank: RankSpans) -> Iterator[Event]:
    def name(what: str, tid: int, **args: str | int) -> Event:
        pid = FIRST_PROCESS + number
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}

    label = world.name(number)
    if world.tp > 1:
        label += f", instance {world.instance_of(number)}"
    yield name("process_name", WORK, name=label)
    yield name("process_sort_index", WORK, sort_index=number)
    tracks = dict(TRACKS)
    served = rank.spans[rank.spans["kind"] == Kind.VISIT]
    tracks |= {DEBTOR_STEPS + d: f"serves instance {d}" for d in sorted({*served["one"].tolist()})}
    for tid, track in tracks.items():
        yield name("thread_name", tid, name=track)
        yield name("thread_sort_index", tid, sort_index=tid)


def _span(pid: int, kind: Kind, started: float, ended: float, one: int, other: int) -> Event:
    # Whole nanoseconds, both edges rounded the same way: what was nested stays nested.
    begin, end = round(1e9 * started), round(1e9 * ended)
    name = f"layer {one}" if kind is Kind.LAYER else NAMES[kind]
    tid = DEBTOR_STEPS + one if kind is Kind.VISIT else kind if kind in TRACKS else WORK
    args = dict(zip(DETAILS.get(kind, ()), (one, other), strict=False))
    return {
        "ph": "X",
        "name": name,
        "cat": kind.name.lower(),
        "pid": pid,
        "tid": int(tid),
        "ts": begin / 1e3,
        "dur": (end - begin) / 1e3,
        "args": args,
    }


def _counters(now: Snapshot, origin: float, tp: int, borrowers: set[int]) -> Iterator[Event]:
    owed: dict[int, dict[str, int]] = {debtor: {} for debtor in borrowers}
    for debtor, creditor, blocks in now.debts:
        owed[debtor][f"instance {creditor}"] = blocks

    def counter(instance: int, name: str, args: dict[str, int]) -> Event:
        at = round(1e6 * (now.at - origin), 3)
        pid = FIRST_PROCESS + instance * tp
        return {"ph": "C", "name": name, "pid": pid, "tid": WORK, "ts": at, "args": args}

    for instance in range(len(now.used)):
        used, capacity = int(now.used[instance]), int(now.capacity[instance])
        hosted = int(now.hosted[instance])
        pool = {OWN: used - hosted, HOSTED: hosted, FREE: capacity - used}
        yield counter(instance, POOL, pool)
        yield counter(instance, ROWS, {"running": int(now.running[instance])})
        prompt, generated = now.prompt_tokens[instance], now.generated_tokens[instance]
        yield counter(instance, TOKENS, {"prompt": int(prompt), "generated": int(generated)})
        if instance in owed:
            yield counter(instance, OWES, owed[instance] or {"nobody": 0})
