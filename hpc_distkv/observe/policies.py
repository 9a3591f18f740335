"""The same rows in several ways, on the same ranks, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages import Request
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.engine.config import OptionError
from hpc_distkv.engine.rank import EngineOptions, RankEngine
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.observe.bench import BenchLeader, lead, ratios, run_led, warm_up
from hpc_distkv.observe.plots import bars
from hpc_distkv.observe.prediction import most_rate, predicted_rate
from hpc_distkv.simulate.trace import Row

RATE = "output_tokens_per_second"
LEND = POLICIES["lend"]
ABLATIONS = {
    "no-dgfm": replace(LEND, dgfm=False),
    "no-planner": replace(LEND, planner=False),
}


def way(name: str, options: EngineOptions) -> EngineOptions:
    """The options of a way by its name: a policy, an ablation of `lend`, or `budget-N` for `lend`
    with a move budget of N tokens per step. Raises OptionError."""
    if name in POLICIES:
        return replace(options, policy=name)
    if name in ABLATIONS:
        return replace(options, policy=ABLATIONS[name])
    kind, _, number = name.partition("-")
    if kind == "budget" and number.isdecimal():
        return replace(options, policy="lend", move_budget=int(number))
    known = ", ".join([*POLICIES, *ABLATIONS, "budget-N"])
    raise OptionError(f"there is no way {name!r} of running rows; there are {known}")


def compare(
    comm: Comm,
    model: Decoder,
    ways: Mapping[str, EngineOptions],
    requests: Sequence[Request],
    repeats: int,
) -> dict[str, Any]:
    """Every way in turn, `repeats` times: on rank 0 the figures of each one's last run, the median
    rates, their ratios to the last way's and the most that any could reach, and what the simulator
    predicts, both from the speeds measured in all of them. Collective. Raises OptionError for rows
    that a way could not answer."""
    engines = {}
    for name, options in ways.items():
        engines[name] = RankEngine(comm, model, options)
        engines[name].join()
        _check(name, engines[name], requests)
    warm_up(next(iter(engines.values())), requests)
    figures: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    leader: BenchLeader | None = None
    for _ in range(repeats):
        for name, engine in engines.items():
            comm.share(None)
            leader = lead(engine, requests)
            figures[name] = run_led(engine, leader)
            rates[name].append(figures[name].get(RATE, 1.0))
    if leader is None:
        return {}
    rows = [
        Row(request.prompt_len, leader.outputs[request.id], limit=request.sampling.max_tokens)
        for request in requests
    ]
    *_, baseline = ways
    speeds = [speed for each in figures.values() for speed in each["speed"]]
    config, instances = engines[baseline].config, comm.world.instances
    predicted = {
        name: predicted_rate(
            model.config, engine.config, engine.config.policy, instances, speeds, rows
        )
        for name, engine in engines.items()
    }
    measured = {name: statistics.median(rates[name]) for name in ways}
    return {
        "rows": len(requests),
        "prompt_tokens": sum(request.prompt_len for request in requests),
        "output_tokens": sum(row.output for row in rows),
        "pool_tokens": config.block_size * config.num_blocks,
        RATE: measured,
        f"over_{baseline}": {name: ratios(rates[name], rates[baseline]) for name in ways},
        f"most_over_{baseline}": most_rate(model.config, config, instances, speeds, rows)
        / measured[baseline],
        "predicted_over_measured": {name: predicted[name] / measured[name] for name in ways},
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


def _check(name: str, engine: RankEngine, requests: Sequence[Request]) -> None:
    longest = max(request.prompt_len + request.sampling.max_tokens for request in requests)
    if longest > engine.capacity_tokens:
        raise OptionError(
            f"the longest row may need the KV of {longest} tokens, and {name} has room for "
            f"{engine.capacity_tokens}: give more --num-blocks, or scale the trace down"
        )
