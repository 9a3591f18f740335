"""The published tables (arXiv 2401.02669, v1 and v2), simulated, and how the system scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.cluster import Cluster
from hpc_distkv.simulate.deployment import Deployment, usable_tp
from hpc_distkv.simulate.models import ModelShape
from hpc_distkv.simulate.simulation import Simulation
from hpc_distkv.simulate.workload import Workload

PUBLISHED = {
    "context_length": "2-19 × the state of the art, up to 1,900K tokens on 32 A100 (v1)",
    "mixes": "1.03-2.4 × vLLM, 18 data sets with few long rows (v1)",
    "short": "1.35-1.73 × independent instances (v2, traces 0-2)",
    "long": "1.4-3.4 × one instance over all GPUs (v2, traces 3-8)",
}
EXPLAINED = {
    "context_length": "Memory alone decides here: pools of all instances over that of one.",
    "mixes": "Isolated instances at the size that serves the mix best, and at the smallest that "
    "holds the longest row; lend at its best size. The size of the published baseline is not "
    "known. Rows that an instance cannot hold are refused, and the ratio counts answered rows "
    "only. All rows are there at the start, so pools are full everywhere and lending gains what "
    "isolated instances lose to packing and to waiting for the last of them; published runs have "
    "arrivals, and room at some instances while others are short.",
    "short": "Baseline: as many isolated instances as lend has, rows dealt out in turn. Rows that "
    "do not fit one instance are refused there and answered by lend.",
    "long": "Baseline: tensor parallelism over as many GPUs as divide the heads. Across the "
    "paper's 125 MB/s Ethernet its all-reduces take seconds a step, so the ratio is far above the "
    "published one, whose baseline is not described in detail; the second ratio is to one such "
    "instance per node, which refuses what its node cannot hold. Lend is at its best size: a long "
    "prompt's linear layers run on the GPUs of one instance.",
}
RATE = "tokens_per_second"
CONFIG = EngineConfig(num_blocks=1, block_size=256, max_num_seqs=256, max_num_batched_tokens=8192)


def simulate(
    cluster: Cluster, model: ModelShape, trace: Workload, policy: str, tp: int | None = None
) -> dict[str, Any]:
    """The figures of one job. `tp` None: as few GPUs an instance as the model fits on."""
    config = replace(CONFIG, policy=POLICIES[policy])
    deployment = Deployment.fit(cluster, model, config, tp)
    return Simulation(deployment, trace.rows).run().figures(deployment)


def context_length(cluster: Cluster, model: ModelShape) -> dict[str, Any]:
    """Tokens of the longest row under lend, on one instance, and on one node as an instance."""
    lend = Deployment.fit(cluster, model, CONFIG)
    node = _within_node(cluster, model)[-1]
    alone = replace(CONFIG, policy=POLICIES["isolated"])
    tokens = {
        "lend": lend.capacity_tokens,
        "instance": Deployment.fit(cluster, model, alone).capacity_tokens,
        "node": Deployment.fit(cluster, model, alone, node).capacity_tokens,
    }
    return {
        "tokens": tokens,
        "over_instance": tokens["lend"] / tokens["instance"],
        "over_node": tokens["lend"] / tokens["node"],
    }


def best(cluster: Cluster, model: ModelShape, trace: Workload, policy: str) -> dict[str, Any]:
    """The figures at the size of instances within a node that answers most tokens per second, of
    those that refuse fewest rows."""
    runs = [simulate(cluster, model, trace, policy, tp) for tp in _within_node(cluster, model)]
    return min(runs, key=lambda figures: (figures["rows"]["refused"], -figures[RATE]))


def mix(cluster: Cluster, model: ModelShape, trace: Workload) -> dict[str, Any]:
    """Lend over isolated instances, both at their best size; and over those just large enough."""
    enough = _fitting_tp(cluster, model, trace)
    return _ratios(
        best(cluster, model, trace, "lend"),
        {
            "isolated": best(cluster, model, trace, "isolated"),
            "isolated, just large enough": simulate(cluster, model, trace, "isolated", enough),
        },
    )


def short(cluster: Cluster, model: ModelShape, trace: Workload) -> dict[str, Any]:
    """Lend over as many isolated instances, the smallest there are."""
    return _ratios(
        simulate(cluster, model, trace, "lend"),
        {"isolated": simulate(cluster, model, trace, "isolated")},
    )


def long(cluster: Cluster, model: ModelShape, trace: Workload) -> dict[str, Any]:
    """Lend over one instance of all GPUs, and over one instance per node."""
    everything = usable_tp(cluster, model, CONFIG.block_size)[-1]
    node = _within_node(cluster, model)[-1]
    return _ratios(
        best(cluster, model, trace, "lend"),
        {
            "one instance": simulate(cluster, model, trace, "queue", everything),
            "one per node": simulate(cluster, model, trace, "queue", node),
        },
    )


def tables(
    cluster: Cluster, model: ModelShape, folder: str | Path, rows: int | None
) -> dict[str, Any]:
    """All published tables by name; traces from `folder`, `rows` of each."""

    def traces(file: str) -> list[Workload]:
        loaded = Workload.load_all(Path(folder) / file)
        return [trace.head(rows) for trace in loaded] if rows else loaded

    return {
        "context_length": {model.name: context_length(cluster, model)},
        "mixes": {t.name: mix(cluster, model, t) for t in traces("mixes.toml")},
        "short": {t.name: short(cluster, model, t) for t in traces("short.toml")},
        "long": {t.name: long(cluster, model, t) for t in traces("long.toml")},
    }


def scale(
    cluster: Cluster, model: ModelShape, trace: Workload, gpus: Sequence[int], rows_per_gpu: int
) -> list[dict[str, Any]]:
    """Throughput per GPU and time of a gManager round on parts of a cluster; as many rows per GPU
    on each."""
    points = []
    for count in gpus:
        nodes, rest = divmod(count, cluster.gpus_per_node)
        if rest or not 0 < nodes <= cluster.nodes:
            raise OptionError(
                f"{count} GPUs are no whole nodes of {cluster.gpus_per_node} out of {cluster.nodes}"
            )
        part = msgspec.structs.replace(cluster, nodes=nodes)
        figures = simulate(part, model, trace.head(rows_per_gpu * count), "lend")
        points.append(
            {
                "gpus": count,
                "rows": figures["rows"],
                "tokens_per_second_per_gpu": figures[RATE] / count,
                "seconds": figures["seconds"],
                "round_seconds": figures["rounds"]["wall_s"],
                "round_bytes": figures["rounds"]["bytes"]["mean"],
                "simulation": figures["simulation"],
            }
        )
    return points


def _within_node(cluster: Cluster, model: ModelShape) -> list[int]:
    sizes = usable_tp(cluster, model, CONFIG.block_size)
    return [tp for tp in sizes if tp <= cluster.gpus_per_node] or sizes[:1]


def _fitting_tp(cluster: Cluster, model: ModelShape, trace: Workload) -> int:
    longest = max(row.prompt + row.output for row in trace.rows)
    sizes = usable_tp(cluster, model, CONFIG.block_size)
    blocks = {tp: cluster.kv_blocks(model, tp, CONFIG.block_size) for tp in sizes}
    enough = [tp for tp in sizes if blocks[tp] * CONFIG.block_size >= longest]
    return enough[0] if enough else sizes[-1]


def _ratios(lend: dict[str, Any], others: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "rate": {"lend": lend[RATE]} | {name: figures[RATE] for name, figures in others.items()},
        "refused": {"lend": lend["rows"]["refused"]}
        | {name: figures["rows"]["refused"] for name, figures in others.items()},
        "tensor_parallel_size": {"lend": lend["tensor_parallel_size"]}
        | {name: figures["tensor_parallel_size"] for name, figures in others.items()},
        "remote_share": lend["remote_share"],
        "lend_over": {name: lend[RATE] / figures[RATE] for name, figures in others.items()},
    }
