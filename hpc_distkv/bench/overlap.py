"""How much of an exchange is hidden behind what its debtor computes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from hpc_distkv.bench.gpu import profiler_of_gpu
from hpc_distkv.bench.runs import run_once, synthetic
from hpc_distkv.comm.transport import Comm
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.rank import joined
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.timesheet import Kind, Recorder

EXCHANGE = "exchange"
"""What an exchange is called among the profiler's events."""


class Span(NamedTuple):
    """From when to when."""

    began: float
    ended: float


class ExchangeRecorder(Recorder):
    """Adds up exchanges, and how long they were waited for; the profiler sees them as ranges."""

    def __init__(self) -> None:
        self.exchanges = 0
        self.seconds = self.waited = 0.0
        self._range: torch.profiler.record_function | None = None
        self._began = 0.0

    def open(self, kind: Kind, key: int = 0) -> None:
        """Queries are posted."""
        if kind is Kind.EXCHANGE:
            self._began = time.perf_counter()
            self._range = torch.profiler.record_function(EXCHANGE)
            self._range.__enter__()  # type: ignore[no-untyped-call]

    def close(self, kind: Kind, key: int = 0, one: int = 0, other: int = 0) -> None:
        """Partial results are here."""
        if kind is Kind.EXCHANGE and self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
            self.exchanges += 1
            self.seconds += time.perf_counter() - self._began

    def span(self, kind: Kind, started: float, ended: float, one: int = 0, other: int = 0) -> None:
        """Something else is over."""
        if kind is Kind.PARTIALS:
            self.waited += ended - started


def exchange_overlap(
    comm: Comm, model: Decoder, options: EngineOptions, context: int, steps: int
) -> dict[str, Any]:
    """One row of `context` prompt tokens and `steps` output tokens, half of whose KV is on another
    rank: how long exchanges take, how long the debtor's host waits for them, and, on a GPU, for how
    much of that time its GPU computes. `exchanges` 0: nothing was lent. Collective."""
    blocks = -(-(context + steps) // options.block_size)
    engine = joined(comm, model, replace(options, num_blocks=blocks // 2 + 2, kv_memory=None))
    requests = synthetic(1, context, steps, model.config.vocab_size)
    run_once(engine, requests)  # Kernels are built, and ranks connected.
    recorder, on_gpu = ExchangeRecorder(), comm.device.place.type == "cuda"
    profiler = profiler_of_gpu() if on_gpu else None
    with profiler or nullcontext():
        run_once(engine, requests, recorder)
    busy = computing(profiler.events()) if profiler else None  # type: ignore[no-untyped-call]
    found = (recorder.exchanges, recorder.seconds, recorder.waited, busy)
    exchanges, seconds, waited, busy = max(comm.share(found), key=itemgetter(0))
    return {
        "exchanges": exchanges,
        "exchange_milliseconds": 1e3 * seconds / exchanges if exchanges else None,
        "waited": waited / seconds if exchanges else None,
        "gpu_computing": busy,
    }


def computing(events: Iterable[Any]) -> float:
    """The part of all exchanges' time in which kernels run, of the profiler's events."""
    exchanges, kernels = [], []
    for event in events:
        span = Span(event.time_range.start, event.time_range.end)
        if event.device_type.name != "CUDA":
            if event.name == EXCHANGE:
                exchanges.append(span)
        elif event.name != EXCHANGE and not event.name.startswith(("Memcpy", "Memset", "nccl")):
            kernels.append(span)
    total = sum(span.ended - span.began for span in exchanges)
    return common(exchanges, kernels) / total if total else 0.0


def common(some: Sequence[Span], others: Sequence[Span]) -> float:
    """How long at least one of `some`, which do not overlap, and one of `others` last at once."""
    shared, left = 0.0, sorted(some)
    for other in _united(others):
        while left and left[0].ended <= other.began:
            left.pop(0)
        for span in left:
            if span.began >= other.ended:
                break
            shared += min(span.ended, other.ended) - max(span.began, other.began)
    return shared


def _united(spans: Iterable[Span]) -> list[Span]:
    """The same time, in spans that do not overlap, in order."""
    united: list[Span] = []
    for span in sorted(spans):
        if united and span.began <= united[-1].ended:
            united[-1] = Span(united[-1].began, max(united[-1].ended, span.ended))
        else:
            united.append(span)
    return united
