"""How much of exchanges is hidden: from spans of the profiler, and in a run of two ranks."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from local_ranks import open_local, run_local
from torch.autograd.profiler_util import DeviceType

from hpc_distkv.bench.overlap import (
    EXCHANGE,
    ExchangeRecorder,
    Span,
    common,
    computing,
    exchange_overlap,
)
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.rank import EngineOptions
from hpc_distkv.step.timesheet import Kind


@pytest.mark.parametrize("seed", range(5))
def test_common_time_is_that_of_every_moment(seed):
    rng = random.Random(seed)
    edges = sorted(rng.sample(range(200), 12))
    some = [Span(*edges[at : at + 2]) for at in range(0, 12, 2)]
    others = [Span(at, at + rng.randint(1, 30)) for at in rng.choices(range(180), k=9)]

    def within(spans, moment):
        return any(span.began <= moment < span.ended for span in spans)

    both = sum(within(some, moment) and within(others, moment) for moment in range(220))
    assert common(some, others) == both > 0


def test_kernels_count_while_an_exchange_is_under_way():
    def event(device, name, start, end):
        return SimpleNamespace(
            device_type=device, name=name, time_range=SimpleNamespace(start=start, end=end)
        )

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event(cpu, EXCHANGE, 0, 100),
        event(cpu, EXCHANGE, 200, 300),
        event(cpu, "aten::mm", 0, 300),
        event(cuda, EXCHANGE, 0, 100),
        event(cuda, "_tile", 50, 90),
        event(cuda, "gemm", 80, 220),
        event(cuda, "Memcpy HtoD", 0, 300),
        event(cuda, "ncclDevKernel_SendRecv", 0, 300),
    ]
    assert computing(events) == (50 + 20) / 200
    assert computing(events[2:]) == 0


def test_the_profiler_sees_exchanges():
    recorder = ExchangeRecorder()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            recorder.open(Kind.EXCHANGE)
            torch.ones(3).add_(1)
            recorder.close(Kind.EXCHANGE)
    seen = [event for event in profiler.events() if event.name == EXCHANGE]
    assert len(seen) == recorder.exchanges == 3
    assert all(event.device_type == DeviceType.CPU for event in seen)


def test_two_ranks_exchange_in_every_layer(tiny_model):
    options = EngineOptions(block_size=16, threads=1, max_num_batched_tokens=64)
    config = ModelConfig.from_dir(tiny_model)

    def work(comm):
        return exchange_overlap(comm, load_decoder(tiny_model, config), options, 300, 20)

    one, other = run_local(open_local(2, 60.0), work)
    assert one == other
    assert one["exchanges"] % config.num_layers == 0
    assert one["exchanges"] >= 19 * config.num_layers
    assert 0 < one["waited"] < 1
    assert one["gpu_computing"] is None
