"""The engine of one rank, built from its pools and from what all ranks have told of theirs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from hpc_distkv.comm.collective.probe import LinkCosts, probe
from hpc_distkv.comm.together import together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.assign.queue import RequestSource, SyncSource
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.requests import Request, kv_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.stop import TextDecoder
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import dtype_name
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.follower import Follower
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.worker import Leader, Worker
from hpc_distkv.start.capacity import node_room
from hpc_distkv.start.layout import Layout, lay_out
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.graphs import decode_graphs
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.timesheet import Recorder, TimeSheet


class RankEngine:
    """One rank of an SPMD job, ready to run: every rank makes one (`joined`) and runs; rank 0 also
    leads."""

    def __init__(
        self,
        layout: Layout,
        config: EngineConfig,
        capacity_blocks: int,
        links: LinkCosts | None,
        decoder: TextDecoder | None,
    ) -> None:
        """`capacity_blocks`: rBlocks that one request may use at most; `links`: what links between
        ranks cost; `decoder`: the tokenizer, for requests with stop strings."""
        self.comm, self.config, self.capacity_blocks = layout.comm, config, capacity_blocks
        self._layout, self._links, self._decoder = layout, links, decoder
        self._graphs = decode_graphs(layout.model, layout.pool, layout.heads, layout.recorded)
        """Of all runs."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV one request may have at most."""
        return self.capacity_blocks * self.config.block_size

    @property
    def threads(self) -> int:
        """Compute threads."""
        return torch.get_num_threads()

    @property
    def processor(self) -> str:
        """What this rank computes on, for people."""
        device = self.comm.device
        return f"{self.threads} threads" if device.place.type == "cpu" else f"one {device.name}"

    @property
    def dtype(self) -> str:
        """Of weights and KV."""
        return dtype_name(self._layout.model.dtype)

    def run(
        self,
        leader: Leader | None = None,
        recorder: Recorder | None = None,
        interrupt: Interrupt | None = None,
    ) -> Instance:
        """Work until all requests of rank 0's leader are answered, or `interrupt` of any rank ends
        the run. Returns what this rank knows of its instance. Collective; `leader` is given on rank
        0 alone; `recorder`: is told when what happens here. Raises StallError, ProtocolError, and
        what the leader raises."""
        time = TimeSheet(recorder or Recorder())
        layout = self._layout
        parts = Parts(
            comm=self.comm,
            model=layout.model,
            pool=layout.pool,
            config=self.config,
            heads=layout.heads,
            decoder=self._decoder,
            time=time,
            host_pool=layout.host_pool,
            graphs=self._graphs,
        )
        interrupt = interrupt or Interrupt()
        follows = self.comm.world.lane > 0
        worker = Follower(parts, interrupt) if follows else Worker(parts, leader, interrupt)
        worker.run()
        time.fill(worker.instance.counters)
        return worker.instance

    def gmanager(self, source: RequestSource) -> GManager:
        """The gManager for a run over the requests of `source`: rank 0's leader owns one."""
        return GManager(source, self._instance_links(), self.config)

    def fitting(self, requests: Iterable[Request]) -> SyncSource:
        """A source of requests that nobody has checked. Raises OptionError, when it is taken, for
        one that could never end."""
        return SyncSource(map(self._fitting, requests))

    def _fitting(self, request: Request) -> Request:
        tokens = kv_tokens(request.prompt_len, request.sampling.max_tokens)
        if tokens > self.capacity_tokens:
            raise OptionError(
                f"request {request.id} may need the KV of {tokens} tokens "
                f"({request.prompt_len} of its prompt), but there is room for "
                f"{self.capacity_tokens}: give more --num-blocks or --host-kv-memory, or more ranks"
            )
        return request

    def _instance_links(self) -> Links:
        """Between the instances, with the costs of the probe if there was one: an exchange takes a
        round trip in every layer, and the bytes of its queries and partial results."""
        world, config = self.comm.world, self._layout.model.config
        nodes = [world.node_of(instance) for instance in range(world.instances)]
        if self._links is None:
            return Links(nodes)
        row_bytes = self._layout.query_bytes + 4 * config.num_heads * (config.head_dim + 1)
        return Links(
            nodes,
            seconds=config.num_layers * np.array(self._links.round_trip),
            row_seconds=config.num_layers * row_bytes / np.array(self._links.bandwidth),
        )


def connected(layout: Layout, decoder: TextDecoder | None = None) -> RankEngine:
    """This rank's engine, once all ranks have measured their pools and links. Collective. The ranks
    of an instance hold the same rBlocks, so its smallest pool counts."""
    comm, links = layout.comm, None
    if layout.policy.sharing:
        links = probe(comm, layout.query_bytes, layout.pool.rblock(0).nbytes)
    instances = layout.shared()
    total = sum(each.lendable for each in instances)
    capacity = min(each.blocks + total - each.lendable + each.host_blocks for each in instances)
    config = layout.config(instances[comm.world.instance])
    return RankEngine(layout, config, capacity, links, decoder)


def joined(
    comm: Comm, model: Decoder, options: EngineOptions, decoder: TextDecoder | None = None
) -> RankEngine:
    """This rank's engine, once all ranks have theirs. Collective. Raises SetupError on all ranks
    if one cannot."""
    room = node_room(comm)  # All have their weights, and none a pool yet.
    return connected(together(comm, lambda: lay_out(comm, model, options, room)), decoder)
