"""What lending costs: a decode with remote KV, and ranks that need none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hpc_distkv.bench.runs import BenchLeader, alternate, lead, ratios, run_once, synthetic, warm_up
from hpc_distkv.comm.alone import open_alone
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.rank import joined
from hpc_distkv.start.options import EngineOptions


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


def lending_against_alone(
    comm: Comm, model: Decoder, options: EngineOptions, requests: Sequence[Request], repeats: int
) -> dict[str, Any]:
    """An even load that fits: ranks that could lend to each other, against each rank alone in a
    world of its own with its share of the same rows."""
    alone = open_alone(comm.stall_timeout)
    alone.compute_on(comm.device, alone.transport)
    together = joined(comm, model, options)
    single = joined(alone, model, replace(options, threads=together.threads))
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
