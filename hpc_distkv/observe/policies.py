"""The same rows under every policy, on the same ranks, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages import Request
from hpc_distkv.control.policy import Policy
from hpc_distkv.engine.config import OptionError
from hpc_distkv.engine.rank import EngineOptions, RankEngine
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.observe.bench import ratios, run_once, warm_up

RATE = "output_tokens_per_second"


def compare_policies(
    comm: Comm,
    model: Decoder,
    options: EngineOptions,
    requests: Sequence[Request],
    policies: Mapping[str, str | Policy],
    repeats: int,
) -> dict[str, Any]:
    """Every policy in turn, `repeats` times: on rank 0 the figures of each one's last run, its
    rates, and the ratios of its rates to those of the last policy. Collective. Raises OptionError
    for rows that a policy could not answer."""
    engines = {}
    for name, policy in policies.items():
        engines[name] = RankEngine(comm, model, replace(options, policy=policy))
        engines[name].join()
        _check(name, engines[name], requests)
    warm_up(next(iter(engines.values())), requests)
    figures: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(repeats):
        for name, engine in engines.items():
            comm.share(None)
            figures[name] = run_once(engine, requests)
            rates[name].append(figures[name].get(RATE, 1.0))
    *_, baseline = policies
    return {
        "rows": len(requests),
        "prompt_tokens": sum(request.prompt_len for request in requests),
        "output_tokens": sum(request.sampling.max_tokens for request in requests),
        "pool_tokens": options.block_size * engines[baseline].config.num_blocks,
        "median_rate": {name: statistics.median(rates[name]) for name in policies},
        f"over_{baseline}": {name: ratios(rates[name], rates[baseline]) for name in policies},
        "figures": figures,
    }


def _check(name: str, engine: RankEngine, requests: Sequence[Request]) -> None:
    longest = max(request.prompt_len + request.sampling.max_tokens for request in requests)
    if longest > engine.capacity_tokens:
        raise OptionError(
            f"the longest row may need the KV of {longest} tokens, and policy {name} has room for "
            f"{engine.capacity_tokens}: give more --num-blocks, or scale the trace down"
        )
