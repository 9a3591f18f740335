"""What the parts of a rank's engine have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hpc_distkv.comm.transport import Comm
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.stop import TextDecoder
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.step.graphs import DecodeGraphs
from hpc_distkv.step.model import Model
from hpc_distkv.step.timesheet import TimeSheet


@dataclass(frozen=True)
class Parts:
    """What a rank is made of."""

    comm: Comm
    model: Model
    """Its shard."""
    pool: BlockPool
    config: EngineConfig
    shape: tuple[int, int]
    """Query heads and head dimension of the shard."""
    decoder: TextDecoder | None
    """For requests with stop strings."""
    time: TimeSheet
    host_pool: BlockPool | None = None
    """rBlocks in the host's memory."""
    graphs: DecodeGraphs | None = None
    """Recorded decode steps, where steps can be recorded."""

    @cached_property
    def positional(self) -> bool:
        """Whether in some layer it matters where queries and keys stand in their sequence. If not,
        all queries to the same rBlocks are attended to at once."""
        return any(spec.positional for spec in self.model.attention)
