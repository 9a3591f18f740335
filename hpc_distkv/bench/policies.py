"""The same rows in several ways, on the same ranks, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_distkv.bench.plots import bars
from hpc_distkv.bench.prediction import most_rate, predicted_rate
from hpc_distkv.bench.runs import BenchLeader, lead, ratios, run_led, warm_up
from hpc_distkv.comm.together import together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request, kv_tokens
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.rank import RankEngine, connected
from hpc_distkv.simulate.workload import TraceRow
from hpc_distkv.start.capacity import lone_room
from hpc_distkv.start.layout import Layout, lay_out
from hpc_distkv.start.loading import load_model, unite
from hpc_distkv.start.options import EngineOptions

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


def engines_of(
    names: Sequence[str], comm: Comm, path: str, model: Decoder, options: EngineOptions
) -> dict[str, RankEngine]:
    """This rank's engine for every way by name, joined with those of the others. `model`: of
    directory `path`, whole. Collective. Raises SetupError on all ranks if one cannot."""

    def make() -> dict[str, Layout]:
        layouts, pool = {}, 0
        # The replicas first: they say how much memory there is for the others.
        for name in sorted(names, key=lambda name: name == "tensor-parallel"):
            chosen = way(name, options, comm.world.size)
            layouts[name] = _layout_of(comm, path, model, chosen, pool)
            pool = layouts[name].num_blocks
        return {name: layouts[name] for name in names}

    engines = {}
    for name, layout in together(comm, make).items():
        unite(layout.comm)
        engines[name] = connected(layout)
    return engines


def _layout_of(
    comm: Comm, path: str, model: Decoder, options: EngineOptions, block_memory: int
) -> Layout:
    """This rank's pools for one way. A way of tensor parallelism loads its shard, and its pool
    takes as many bytes as others' `block_memory` rBlocks. Raises OptionError and ModelError."""
    if options.tensor_parallel_size == 1:
        return lay_out(comm, model, options, lone_room(comm))
    own = copy(comm)
    shard = load_model(own, path, model.config, options)
    blocks = block_memory * model.config.num_kv_heads // shard.config.num_kv_heads
    sized = replace(options, num_blocks=blocks, kv_memory=None)
    return lay_out(own, shard, sized, lone_room(own))


def check_fit(engines: Mapping[str, RankEngine], requests: Sequence[Request]) -> None:
    """Raises OptionError for rows that a way could not answer."""
    longest = max(kv_tokens(each.prompt_len, each.sampling.max_tokens) for each in requests)
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
    figures, rates, leader = _measure(engines, requests, repeats)
    if leader is None:
        return {}
    rows = [
        TraceRow(r.prompt_len, len(leader.tokens[r.id]) // 4, limit=r.sampling.max_tokens)
        for r in requests
    ]
    predicted, most = _predict(model, engines, figures, rows)
    measured = {name: statistics.median(rates[name]) for name in engines}
    *_, baseline = engines
    config = engines[baseline].config
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


def _measure(
    engines: Mapping[str, RankEngine], requests: Sequence[Request], repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]], BenchLeader | None]:
    """The figures of every way's last run, the rates of all its runs, and on rank 0 the leader of
    the very last run. Collective."""
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
    return figures, rates, leader


def _predict(
    model: ModelConfig,
    engines: Mapping[str, RankEngine],
    figures: Mapping[str, Mapping[str, Any]],
    rows: Sequence[TraceRow],
) -> tuple[dict[str, float], float]:
    """What the simulator predicts for every way, and the most that any could reach on the ranks as
    the last one cuts them: tokens per second, from the speeds in `figures`."""
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
    *_, last = engines.values()
    world = last.comm.world
    return predicted, most_rate(model, last.config, world.instances, speeds[world.tp], rows)


def draw(folder: Path, traces: Mapping[str, Mapping[str, Any]]) -> None:
    """The comparisons by trace as plots in `folder`."""
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
