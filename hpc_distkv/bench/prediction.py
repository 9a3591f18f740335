"""What can be said of a run on real ranks from speeds that such ranks have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.simulate.cluster import Cluster, DeviceSpec, Measured
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.models import ModelShape
from hpc_distkv.simulate.simulation import Simulation
from hpc_distkv.simulate.workload import TraceRow

BYTES_PER_SECOND = 2e9
"""Of rBlocks that move in host memory; assumed: they are a small part of any run."""


def predicted_rate(
    model: ModelConfig,
    config: EngineConfig,
    policy: str | Policy,
    ranks: int,
    speeds: Sequence[Mapping[str, float]],
    rows: Sequence[TraceRow],
) -> float:
    """Output tokens per second that the simulator predicts for `rows` on `ranks` ranks of one
    node. `speeds`: what ranks measured (`decide.pace.Speed`); their means count."""
    policy = POLICIES[policy] if isinstance(policy, str) else policy
    deployment = Deployment(
        Cluster(1, ranks, DeviceSpec("rank", 1e12, 0.0), measured=_measured(model, speeds)),
        ModelShape.of(model),
        1,
        replace(config, policy=policy if ranks > 1 else POLICIES["queue"]),
    )
    figures = Simulation(deployment, rows).run().figures(deployment)
    return float(figures["output_tokens_per_second"])


def most_rate(
    model: ModelConfig,
    config: EngineConfig,
    ranks: int,
    speeds: Sequence[Mapping[str, float]],
    rows: Sequence[TraceRow],
) -> float:
    """Output tokens per second that no policy can exceed: as if all work were spread evenly over
    the ranks, with memory full at every moment, or as long as the longest row takes alone."""
    rates = _measured(model, speeds)
    pool = config.num_blocks * config.block_size
    shared = longest = 0.0
    for row in rows:
        prompt, output = row.prompt, row.output
        held = prompt + (output - 1) / 2
        own = prompt * (rates.prefill_per_token + prompt / 2 * rates.per_pair)
        # The first output token comes with the prompt.
        own += (output - 1) * (rates.per_token + held * rates.per_kv_token)
        # A step's fixed time is shared by the rows that fit into memory beside this one.
        shared += own + output * rates.fixed * min(1.0, held / pool)
        longest = max(longest, own + output * rates.fixed)
    outputs = sum(row.output for row in rows)
    return outputs / max(shared / ranks, longest)


def _measured(model: ModelConfig, speeds: Sequence[Mapping[str, float]]) -> Measured:
    def typical(name: str) -> float:
        return mean([speed[name] for speed in speeds if speed[name]] or [0.0])

    return Measured(
        fixed=typical("fixed"),
        per_token=typical("per_token"),
        prefill_per_token=typical("prompt"),
        per_kv_token=typical("per_kv"),
        per_pair=typical("prompt") / model.attention_tokens,
        exchange=typical("exchange") / model.num_layers,
        bytes_per_second=BYTES_PER_SECOND,
    )
