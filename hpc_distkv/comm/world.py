"""Which ranks there are, and where."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_distkv.ids import InstanceId


@dataclass(frozen=True)
class World:
    """The ranks of a job as one of them sees them. An instance is `tp` consecutive ranks that hold
    one replica of the model; a lane is the ranks with the same index inside their instances."""

    rank: int
    nodes: tuple[int, ...]
    """Node number of every rank."""
    tp: int = 1
    hosts: tuple[str, ...] = ()
    """Host name of every rank, for messages; empty if unknown."""
    cores: float = 1.0
    """This rank's share of the cores it may run on; below 1 where ranks outnumber them."""

    def __post_init__(self) -> None:
        if self.size % self.tp:
            raise ValueError(
                f"{self.size} ranks cannot be cut into instances of {self.tp}: "
                f"start a multiple of {self.tp} ranks"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    @property
    def local_rank(self) -> int:
        """Index of this rank among the ranks of its node."""
        return self.nodes[: self.rank].count(self.nodes[self.rank])

    @property
    def local_size(self) -> int:
        """Number of ranks on this node."""
        return self.nodes.count(self.nodes[self.rank])

    @property
    def instances(self) -> int:
        """Number of replicas of the model."""
        return self.size // self.tp

    @property
    def instance(self) -> InstanceId:
        """This rank's instance."""
        return self.instance_of(self.rank)

    @property
    def lane(self) -> int:
        """This rank's index inside its instance."""
        return self.rank % self.tp

    @property
    def members(self) -> range:
        """The ranks of this rank's instance, by lane."""
        return range(self.rank - self.lane, self.rank - self.lane + self.tp)

    def rank_of(self, instance: int) -> int:
        """The rank of this rank's lane in `instance`."""
        return instance * self.tp + self.lane

    def instance_of(self, rank: int) -> InstanceId:
        """The instance of any rank."""
        return InstanceId(rank // self.tp)

    def node_of(self, instance: int) -> int:
        """The node of the first rank of `instance`."""
        return self.nodes[instance * self.tp]

    def name(self, rank: int) -> str:
        """What messages call a rank: "rank 2 on nid0042"."""
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"
