"""What the host does for a decode step, measured beside a device that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpc_distkv.attention import AttentionSpec
from hpc_distkv.comm.alone import open_alone
from hpc_distkv.comm.device import Device, Fetch
from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.requests import Request, Result
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.decoder import Attend
from hpc_distkv.model.shard import Alone, Lanes
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.worker import Leader, Worker
from hpc_distkv.step.model import QueryHeads
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.timesheet import Recorder, TimeSheet

BLOCK = 32
VOCABULARY = 64
STEADY = 10
"""Steps at both ends of a run that do not count: rows begin and end there."""


class Moment:
    """A time of the host's clock."""

    def __init__(self, at: float) -> None:
        self._at = at

    def query(self) -> bool:
        """Whether it has passed."""
        return time.perf_counter() >= self._at


class Metronome(Device):
    """Takes the same time for every step, one after another, and computes next to nothing."""

    deferred = True

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free = 0.0
        """When it is done with all that it was asked for."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """Asked for once a step, at its end."""
        self._free = max(self._free, time.perf_counter()) + self._seconds
        return Fetch(list(tensors), Moment(self._free))


class NoLayers:
    """A model without any; its logits are the same for all tokens."""

    attention: Sequence[AttentionSpec] = ()
    capturable = True
    needs_lengths = False
    lanes: Lanes = Alone()

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        pause: Callable[[], None],
        lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        """Nothing."""
        return torch.zeros(len(tokens), 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(len(hidden), VOCABULARY)


class TimedLeader(Leader):
    """A leader that notes when a control round has ended: here there is one in every step."""

    def __init__(
        self, requests: Sequence[Request], config: EngineConfig, clock: Callable[[], float]
    ) -> None:
        self.gmanager = GManager(SyncSource(requests), Links([0]), config)
        self.ends: list[float] = []
        self._clock = clock

    def finish(self, result: Result) -> None:
        """Results do not matter."""

    def tick(self) -> None:
        """A round has ended."""
        self.ends.append(self._clock())


def host_figures(requests: Sequence[Request], step_seconds: float) -> dict[str, Any]:
    """Requests of one prompt length and one output length that run all at once, on one rank: the
    host's processor time for a decode step, and how long one takes in the mean beside a device
    that needs `step_seconds` for it."""
    return {
        "rows": len(requests),
        "host_microseconds": 1e6 * _per_step(requests, 0.0, time.thread_time),
        "device_milliseconds": 1e3 * step_seconds,
        "step_milliseconds": 1e3 * _per_step(requests, step_seconds, time.perf_counter),
    }


def _per_step(
    requests: Sequence[Request], step_seconds: float, clock: Callable[[], float]
) -> float:
    rows, first = len(requests), requests[0]
    blocks = rows * (-(-(first.prompt_len + first.sampling.max_tokens) // BLOCK) + 1)
    config = EngineConfig(
        num_blocks=blocks,
        block_size=BLOCK,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * first.prompt_len,
        policy=POLICIES["queue"],
        enable_prefix_caching=True,
    )
    comm = open_alone()
    comm.compute_on(Metronome(step_seconds), comm.transport, eager=1.0)
    leader = TimedLeader(requests, config, clock)
    pool = BlockPool(blocks, 1, 1, BLOCK, 1, torch.float32)
    parts = Parts(
        comm=comm,
        model=NoLayers(),
        pool=pool,
        config=config,
        heads=QueryHeads(1, 1),
        time=TimeSheet(Recorder()),
    )
    Worker(parts, leader, Interrupt()).run()
    ends = leader.ends[-first.sampling.max_tokens + STEADY : -STEADY]
    return (ends[-1] - ends[0]) / (len(ends) - 1)
