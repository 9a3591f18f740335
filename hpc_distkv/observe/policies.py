"""The same rows in several ways, on the same ranks, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.control.requests import Request
from hpc_distkv.engine.config import OptionError
from hpc_distkv.engine.options import EngineOptions
from hpc_distkv.engine.rank import RankEngine, load_model
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.observe.bench import BenchLeader, lead, ratios, run_led, warm_up
from hpc_distkv.observe.plots import bars
from hpc_distkv.observe.prediction import most_rate, predicted_rate
from hpc_distkv.simulate.workload import Row

RATE = "output_tokens_per_second"
LEND = POLICIES["lend"]
ABLATIONS = {
    "no-dgfm": replace(LEND, dgfm=False),
    "no-planner": replace(LEND, planner=False),
}


def way(name: str, options: EngineOptions, ranks: int) -> EngineOptions:
    """The options of a way by its name: a policy, an ablation of `lend`, `budget-N` for `lend` with
    a move budget of N tokens per step, or one instance of all ranks. Raises OptionError."""
    if name in POLICIES:
        return replace(options, policy=name)
    if name == "tensor-parallel":
        return replace(options, policy="queue", tensor_parallel_size=ranks)
    if name in ABLATIONS:
        return replace(options, policy=ABLATIONS[name])
    kind, _, number = name.partition("-")
    if kind == "budget" and number.isdecimal():
        return replace(options, policy="lend", move_budget=int(number))
    known = ", ".join([*POLICIES, *ABLATIONS, "budget-N", "tensor-parallel"])
    raise OptionError(f"there is no way {name!r} of running rows; there are {known}")


def engine_of(
    comm: Comm, path: str, model: Decoder, options: EngineOptions, block_memory: int
) -> RankEngine:
    """This rank's engine for one way. `model`: of directory `path`, whole; a way of tensor
    parallelism loads its shard, and its pool takes as many bytes as others' `block_memory` rBlocks.
    Raises OptionError and ModelError."""
    if options.tensor_parallel_size == 1:
        return RankEngine(comm, model, options)
    own = copy(comm)
    shard = load_model(own, path, options)
    blocks = block_memory * model.config.num_kv_heads // shard.config.num_kv_heads
    return RankEngine(own, shard, replace(options, num_blocks=blocks, kv_memory=None))


def check_fit(engines: Mapping[str, RankEngine], requests: Sequence[Request]) -> None:
    """Raises OptionError for rows that a way could not answer."""
    longest = max(request.prompt_len + request.sampling.max_tokens for request in requests)
    for name, engine in engines.items():
        if longest > engine.capacity_tokens:
            raise OptionError(
                f"the longest row may need the KV of {longest} tokens, and {name} has room for "
                f"{engine.capacity_tokens}: give more --num-blocks, or scale the trace down"
            )


def compare(
    model: ModelConfig,
    engines: Mapping[str, RankEngine],
    requests: Sequence[Request],
    repeats: int,
) -> dict[str, Any]:
    """Every way in turn, `repeats` times: on rank 0 the figures of each one's last run, the median
    rates, their ratios to the last way's and the most that any could reach, and what the simulator
    predicts, both from the speeds measured in all of them. Collective, by engines that have
    joined."""
    *_, baseline = engines
    world = engines[baseline].comm.world
    warm_up(next(iter(engines.values())), requests)
    figures: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    leader: BenchLeader | None = None
    for _ in range(repeats):
        for name, engine in engines.items():
            engine.comm.share(None)
            leader = lead(engine, requests)
            figures[name] = run_led(engine, leader)
            rates[name].append(figures[name].get(RATE, 1.0))
    if leader is None:
        return {}
    rows = [
        Row(r.prompt_len, len(leader.tokens[r.id]) // 4, limit=r.sampling.max_tokens)
        for r in requests
    ]
    speeds: dict[int, list[dict[str, float]]] = {}
    for name, engine in engines.items():
        speeds.setdefault(engine.comm.world.tp, []).extend(figures[name]["speed"])
    predicted = {
        name: predicted_rate(
            model,
            engine.config,
            engine.config.policy,
            engine.comm.world.instances,
            speeds[engine.comm.world.tp],
            rows,
        )
        for name, engine in engines.items()
    }
    config = engines[baseline].config
    measured = {name: statistics.median(rates[name]) for name in engines}
    most = most_rate(model, config, world.instances, speeds[world.tp], rows)
    return {
        "rows": len(requests),
        "prompt_tokens": sum(request.prompt_len for request in requests),
        "output_tokens": sum(row.output for row in rows),
        "pool_tokens": config.block_size * config.num_blocks,
        RATE: measured,
        f"over_{baseline}": {name: ratios(rates[name], rates[baseline]) for name in engines},
        f"most_over_{baseline}": most / measured[baseline],
        "predicted_over_measured": {name: predicted[name] / measured[name] for name in engines},
        "figures": figures,
    }


def draw(folder: Path, traces: Mapping[str, Mapping[str, Any]]) -> None:
    """The comparisons by trace as plots in `folder`. Raises OptionError without matplotlib."""
    baseline = next(key for key in next(iter(traces.values())) if key.startswith("over_"))
    base = baseline.removeprefix("over_")
    throughput = {
        trace: {name: ratio["median"] for name, ratio in result[baseline].items()}
        for trace, result in traces.items()
    }
    bars(folder / "throughput.svg", f"Throughput over {base}", throughput, "×", base)
    remote = {
        trace: {name: 1e2 * f["remote_share"] for name, f in result["figures"].items()}
        for trace, result in traces.items()
    }
    bars(folder / "remote-share.svg", "rBlocks away from home", remote, "%", None)
    for percentile in ("p50", "p99"):
        gaps = {
            trace: {
                name: 1e3 * figures["between_tokens_s"][percentile]
                for name, figures in result["figures"].items()
                if figures["between_tokens_s"]
            }
            for trace, result in traces.items()
        }
        title = f"Time between two tokens of a row, {percentile}"
        bars(folder / f"between-tokens-{percentile}.svg", title, gaps, "ms", None)
