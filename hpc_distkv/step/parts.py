"""What a run on one rank is built from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hpc_distkv.comm.transport import Comm
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.stop import TextDecoder
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.step.graphs import DecodeGraphs
from hpc_distkv.step.model import Model, QueryHeads
from hpc_distkv.step.timesheet import TimeSheet


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The complete parts of one rank's run: every object of `step/` and `ranks/` takes its own from
    here."""

    comm: Comm
    model: Model
    """This rank's shard."""
    pool: BlockPool
    config: EngineConfig
    heads: QueryHeads
    decoder: TextDecoder | None = None
    """For requests with stop strings."""
    time: TimeSheet
    host_pool: BlockPool | None = None
    """rBlocks in the host's memory."""
    graphs: DecodeGraphs | None = None
    """Recorded decode steps, where steps can be recorded."""

    @cached_property
    def positional(self) -> bool:
        """True if scores of some layer depend on positions (windows, ALiBi). If not, all queries to
        the same rBlocks are attended to at once."""
        return any(spec.positional for spec in self.model.attention)
