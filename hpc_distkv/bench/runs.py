"""Runs that are measured, and ways to run that are compared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpc_distkv.control.messages.requests import Request, Result, Sampling, pack_tokens
from hpc_distkv.decide.pace import Speed
from hpc_distkv.ids import RequestId
from hpc_distkv.observe.summary.metrics import peak_memory
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.ranks.rank import RankEngine
from hpc_distkv.ranks.worker import Leader
from hpc_distkv.step.timesheet import Recorder


class BenchLeader(Leader):
    """Feeds synthetic requests and times them."""

    def __init__(self, engine: RankEngine, requests: Iterable[Request]) -> None:
        self.gmanager = engine.gmanager(engine.fitting(requests))
        self.record = RunRecord()
        self.tokens: dict[int, bytes] = {}
        """Request → the tokens of its answer, packed."""

    def finish(self, result: Result) -> None:
        """Note the result's latencies and tokens."""
        self.record.add([result])
        self.tokens[result.id] = result.tokens


def synthetic(
    count: int, input_len: int, output_len: int, vocab_size: int, seed: int = 0
) -> list[Request]:
    """Requests of random token ids that end by length only."""
    rng = random.Random(seed)
    sampling = Sampling(max_tokens=output_len)
    return [
        Request(RequestId(i), pack_tokens(rng.choices(range(vocab_size), k=input_len)), sampling)
        for i in range(count)
    ]


def run_once(
    engine: RankEngine, requests: Sequence[Request], recorder: Recorder | None = None
) -> dict[str, Any]:
    """Answer the requests on all ranks; every rank gets the seconds, rank 0 the other figures."""
    return run_led(engine, lead(engine, requests), recorder)


def lead(engine: RankEngine, requests: Sequence[Request]) -> BenchLeader | None:
    """What rank 0 runs with."""
    return BenchLeader(engine, requests) if engine.comm.world.rank == 0 else None


def run_led(
    engine: RankEngine, leader: BenchLeader | None, recorder: Recorder | None = None
) -> dict[str, Any]:
    """As `run_once`, for the requests of `leader`."""
    comm = engine.comm
    started = time.perf_counter()
    instance = engine.run(leader, recorder)
    seconds = time.perf_counter() - started
    shared = comm.share((peak_memory(), instance.pace.speed))
    if leader is None:
        return {"seconds": seconds}
    figures = leader.record.summary(leader.gmanager.counters, [peak for peak, _ in shared])
    speeds = [Speed(*speed)._asdict() for _, speed in shared[:: comm.world.tp]]
    return figures | {"speed": speeds}


def warm_up(engine: RankEngine, requests: Sequence[Request]) -> None:
    """Build kernels, touch weights and connect ranks before anything is timed."""
    short = Sampling(max_tokens=2)
    few = requests[: 2 * engine.comm.world.size]
    run_once(engine, [Request(r.id, r.prompt[:256], short) for r in few])


def alternate(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure all ways in turn, `repeats` times, so that a drift of the machine meets them all."""
    values: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, measure in ways.items():
            values[way].append(measure())
    return values


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Pair by pair a/b: least, median and largest."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return {"min": min(pairs), "median": statistics.median(pairs), "max": max(pairs)}
