"""A model on a cluster: how many instances of how many ranks, and what each has room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.requests import kv_tokens
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.cluster import Cluster
from hpc_distkv.simulate.cost import CostModel
from hpc_distkv.simulate.host_memory import staged_from
from hpc_distkv.simulate.models import ModelShape
from hpc_distkv.simulate.workload import TraceRow


@dataclass(frozen=True)
class Deployment:
    """Equal instances that fill a cluster."""

    cluster: Cluster
    model: ModelShape
    tp: int
    config: EngineConfig
    """Of every instance; its pool is counted for all ranks of the instance together."""

    @classmethod
    def fit(
        cls,
        cluster: Cluster,
        model: ModelShape,
        config: EngineConfig,
        tp: int | None = None,
        host_memory: int | None = None,
    ) -> Deployment:
        """Instances of `tp` ranks (None: as few as the model fits on) whose pools take all the
        memory there is, and `host_memory` bytes of the host beside that, per rank. Of `config` all
        counts but `num_blocks` and what it says of the host's memory. Raises OptionError."""
        if tp is None:
            tp = usable_tp(cluster, model, config.block_size)[0]
        blocks = cluster.kv_blocks(model, tp, config.block_size)
        if host_memory is not None:
            host = cluster.host_blocks(model, tp, config.block_size, host_memory)
            rates = CostModel(cluster, model, tp, config.block_size).rates.host
            assert rates is not None
            config = replace(
                config,
                host_blocks=host,
                host_copy_seconds=2 * rates.move.each,
                host_staged_from=staged_from(rates, config.block_size),
            )
        alone = cluster.instances(tp) == 1
        return cls(
            cluster,
            model,
            tp,
            replace(
                config,
                num_blocks=blocks,
                max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
                policy=POLICIES["queue"] if alone else config.policy,
                attention_tokens=model.attention_tokens,
            ),
        )

    @property
    def instances(self) -> int:
        """Instances that share the rows."""
        return self.cluster.instances(self.tp)

    @property
    def gpus(self) -> int:
        """Ranks of all instances."""
        return self.instances * self.tp

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV one row may have at most: its home's pool, all that others lend, and the
        memory of its host."""
        blocks = self.config.num_blocks
        cap = blocks if self.config.lend_cap is None else min(blocks, self.config.lend_cap)
        lent = cap * (self.instances - 1) if self.config.policy.lending else 0
        return (blocks + lent + self.config.host_blocks) * self.config.block_size

    @property
    def block_bytes(self) -> int:
        """Of one rBlock on all ranks of an instance."""
        return int(self.model.block_bytes(self.tp, self.config.block_size) * self.tp)

    def cost(self) -> CostModel:
        """Seconds of what an instance does. Raises OptionError if the cluster does not say."""
        return CostModel(self.cluster, self.model, self.tp, self.config.block_size)

    def links(self, cost: CostModel | None = None) -> Links:
        """Between the instances; a class is a level of distance. Without `cost` exchanges over them
        cost nothing."""
        numbers = range(self.instances)
        nodes = [self.cluster.node_of(number, self.tp) for number in numbers]
        switches = [self.cluster.switch_of(number, self.tp) for number in numbers]
        return Links(nodes, switches, exchange=cost.rates.exchange if cost else ())

    def fits(self, row: TraceRow) -> bool:
        """Whether a row could ever end; others are refused before they start."""
        return kv_tokens(row.prompt, row.max_tokens) <= self.capacity_tokens


def usable_tp(cluster: Cluster, model: ModelShape, block_size: int) -> list[int]:
    """The tensor parallel sizes that cut the cluster and the heads evenly and leave room for KV,
    ascending. Raises OptionError, with the reason of the largest, if there is none."""
    usable = []
    reason: OptionError | None = None
    for tp in range(1, cluster.nodes * cluster.gpus_per_node + 1):
        try:
            cluster.kv_blocks(model, tp, block_size)
        except OptionError as error:
            reason = error
        else:
            usable.append(tp)
    if not usable:
        raise reason or OptionError(f"the cluster has no place for {model.name}")
    return usable
