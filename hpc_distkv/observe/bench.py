"""Benchmarks: figures of one run, and ratios of two ways measured side by side in one run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hpc_distkv.comm.local import open_local
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.requests import Request, Result, Sampling, pack_tokens
from hpc_distkv.engine.options import EngineOptions
from hpc_distkv.engine.pace import Speed
from hpc_distkv.engine.rank import RankEngine, joined
from hpc_distkv.engine.recorder import Recorder
from hpc_distkv.engine.worker import Leader
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.observe.metrics import peak_memory
from hpc_distkv.observe.run import RunRecord
from hpc_distkv.observe.trace import begin_trace


class BenchLeader(Leader):
    """Feeds synthetic requests and times them."""

    def __init__(self, engine: RankEngine, requests: Iterator[Request]) -> None:
        self.gmanager = engine.gmanager(requests)
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
        Request(i, pack_tokens(rng.choices(range(vocab_size), k=input_len)), sampling)
        for i in range(count)
    ]


def run_once(
    engine: RankEngine, requests: Sequence[Request], recorder: Recorder | None = None
) -> dict[str, Any]:
    """Answer the requests on all ranks; every rank gets the seconds, rank 0 the other figures."""
    return run_led(engine, lead(engine, requests), recorder)


def lead(engine: RankEngine, requests: Sequence[Request]) -> BenchLeader | None:
    """What rank 0 runs with."""
    return BenchLeader(engine, iter(requests)) if engine.comm.world.rank == 0 else None


def run_led(
    engine: RankEngine, leader: BenchLeader | None, recorder: Recorder | None = None
) -> dict[str, Any]:
    """As `run_once`, for the requests of `leader`."""
    comm = engine.comm
    started = time.perf_counter()
    worker = engine.run(leader, recorder)
    seconds = time.perf_counter() - started
    shared = comm.share((peak_memory(), worker.speed))
    if leader is None:
        return {"seconds": seconds}
    figures = leader.record.summary(leader.gmanager.counters, [peak for peak, _ in shared])
    speeds = [Speed(*speed)._asdict() for _, speed in shared[:: comm.world.tp]]
    return figures | {"speed": speeds}


def throughput(
    comm: Comm, model: Decoder, options: EngineOptions, requests: Sequence[Request]
) -> dict[str, Any]:
    """One run over all ranks after a warm-up."""
    engine = joined(comm, model, options)
    warm_up(engine, requests)
    if comm.device.place.type == "cuda":  # Kernels are chosen and built by the sizes they meet.
        run_once(engine, requests)
    return run_once(engine, requests)


def warm_up(engine: RankEngine, requests: Sequence[Request]) -> None:
    """Build kernels, touch weights and connect ranks before anything is timed."""
    short = Sampling(max_tokens=2)
    few = requests[: 2 * engine.comm.world.size]
    run_once(engine, [Request(r.id, r.prompt[:256], short) for r in few])


def remote_against_local(
    comm: Comm, model: Decoder, options: EngineOptions, context: int, steps: int, repeats: int
) -> dict[str, Any]:
    """A long decode with half of its KV on a second rank, against the same decode with all KV at
    home, on the same cores: alone the home rank has the threads of both. In float32 all ways have
    the same tokens."""
    threads = options.threads or 1
    blocks = -(-(context + steps) // options.block_size)
    local = replace(
        options, num_blocks=blocks + 2, kv_memory=None, policy="queue", threads=2 * threads
    )
    remote = replace(options, num_blocks=blocks // 2 + 2, kv_memory=None, threads=threads)
    answers: set[bytes] = set()
    ways = {
        "local": lambda: decode_rate(comm, model, local, context, steps, answers),
        "local_half_the_threads": lambda: decode_rate(
            comm, model, replace(local, threads=threads), context, steps, answers
        ),
        "remote": lambda: decode_rate(comm, model, remote, context, steps, answers),
    }
    rates = alternate(ways, repeats)
    return {
        "context": context,
        "same_tokens": len(answers) == 1,
        "decode_tokens_per_second": {way: statistics.median(rates[way]) for way in ways},
        "remote_over_local": ratios(rates["remote"], rates["local"]),
        "remote_over_local_half_the_threads": ratios(
            rates["remote"], rates["local_half_the_threads"]
        ),
    }


def decode_rate(
    comm: Comm,
    model: Decoder,
    options: EngineOptions,
    context: int,
    steps: int,
    answers: set[bytes],
) -> float:
    """Tokens per second of one row's decode after its prompt of `context` tokens; rank 0 adds its
    answer to `answers`."""
    engine = joined(comm, model, options)
    requests = synthetic(1, context, steps, model.config.vocab_size)
    leader = lead(engine, requests)
    engine.run(leader)
    rate = 0.0
    if leader:
        summary = leader.record.summary(leader.gmanager.counters, [])
        decode = summary["latency_s"]["max"] - summary["time_to_first_token_s"]["max"]
        rate = (steps - 1) / decode
        answers.update(leader.tokens.values())
    return comm.share(rate)[0]


def unused_lending(
    comm: Comm, model: Decoder, options: EngineOptions, requests: Sequence[Request], repeats: int
) -> dict[str, Any]:
    """An even load that fits: ranks that could lend to each other, against each rank alone in a
    world of its own with its share of the same rows."""
    (alone,) = open_local(1, comm.stall_timeout)
    alone.device = comm.device
    together = joined(comm, model, options)
    single = RankEngine(alone, model, replace(options, threads=together.threads))
    single.join()
    mine = requests[comm.world.rank :: comm.world.size]
    warm_up(together, requests)

    def slowest_alone() -> float:
        comm.share(None)
        started = time.perf_counter()
        leader = BenchLeader(single, iter(mine))
        single.run(leader)
        return max(comm.share(time.perf_counter() - started))

    def lending() -> float:
        comm.share(None)
        return max(comm.share(float(run_once(together, requests)["seconds"])))

    seconds = alternate({"lending": lending, "alone": slowest_alone}, repeats)
    return {
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "lending_over_alone_time": ratios(seconds["lending"], seconds["alone"]),
    }


def trace_cost(
    comm: Comm, model: Decoder, options: EngineOptions, requests: Sequence[Request], repeats: int
) -> dict[str, Any]:
    """The same rows with a trace and without."""
    engine = joined(comm, model, options)
    warm_up(engine, requests)

    def seconds(recorder: Recorder | None) -> float:
        comm.share(None)
        return max(comm.share(float(run_once(engine, requests, recorder)["seconds"])))

    ways = {"traced": lambda: seconds(begin_trace(comm)), "plain": lambda: seconds(None)}
    times = alternate(ways, repeats)
    return {
        "seconds": {way: statistics.median(values) for way, values in times.items()},
        "traced_over_plain_time": ratios(times["traced"], times["plain"]),
    }


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


def transformers_throughput(
    path: str, model: Decoder, threads: int, requests: Sequence[Request], dummy: bool
) -> dict[str, Any]:
    """The same requests through transformers' `generate`, in the dtype and on the device of
    `model`: one static batch, greedy, no stop. `dummy`: with random weights."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    make: Any = AutoModelForCausalLM
    if dummy:
        with model.device:
            other = make.from_config(AutoConfig.from_pretrained(path), dtype=model.dtype).eval()
    else:
        other = make.from_pretrained(path, dtype=model.dtype).to(model.device)
    tokens = torch.tensor(np.stack([np.frombuffer(r.prompt, "<i4") for r in requests])).long()
    tokens = tokens.to(model.device)
    new = requests[0].sampling.max_tokens
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # On a GPU libraries choose and load kernels by the sizes they meet.
    other.generate(tokens if tokens.is_cuda else tokens[:, :16], max_new_tokens=2, **settings)
    started = time.perf_counter()
    other.generate(tokens, max_new_tokens=new, min_new_tokens=new, **settings).cpu()
    seconds = time.perf_counter() - started
    made = new * len(requests)
    return {"seconds": seconds, "output_tokens_per_second": made / seconds}
