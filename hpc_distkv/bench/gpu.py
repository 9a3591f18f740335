"""How steps go on a GPU, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from hpc_distkv.bench.runs import BenchLeader
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.ranks.rank import RankEngine

WAITS = (
    *("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"),
    *("cudaMemcpy", "cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize"),
)
"""Calls in which the host waits for the GPU."""


def profiler_of_gpu() -> torch.profiler.profile:
    """Sees what the host asks of the GPU, and what the GPU does."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return torch.profiler.profile(activities=kinds)


def profile_steps(engine: RankEngine, requests: Sequence[Request]) -> dict[str, Any]:
    """Answer the requests on one rank under the profiler: what the host asked of the GPU per step,
    where it waited, and for how long the GPU was busy."""
    leader = BenchLeader(engine, requests)
    with profiler_of_gpu() as profiler:
        counters = engine.run(leader).counters
    steps = counters.steps
    calls: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    for average in profiler.key_averages():
        calls[average.key] += average.count
        if average.self_device_time_total and not average.self_cpu_time_total:
            busy[average.key] += average.self_device_time_total
    kernels = {name: n for name, n in busy.items() if not name.startswith(("Memcpy", "Memset"))}
    seconds = counters.step_time
    return {
        "steps": steps,
        "seconds": seconds,
        "waits": {name: calls[name] for name in WAITS if calls[name]},
        "graphs_replayed": calls["cudaGraphLaunch"],
        "polls": calls["cudaEventQuery"],
        "copies_to_host_per_step": _count(calls, "DtoH") / steps,
        "copies_to_gpu_per_step": _count(calls, "HtoD") / steps,
        "kernels_per_step": sum(calls[name] for name in kernels) / steps,
        "gpu_busy": sum(busy.values()) / 1e6 / seconds,
        "kernel_milliseconds_per_step": {
            name[:60]: total / 1e3 / steps for name, total in Counter(kernels).most_common(12)
        },
    }


def _count(calls: Counter[str], direction: str) -> int:
    """Copies in one direction."""
    return sum(n for name, n in calls.items() if name.startswith("Memcpy") and direction in name)
