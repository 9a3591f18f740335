"""The engine of one rank: model shard and block pool, and the worker that runs on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from hpc_distkv.comm.collective.probe import LinkCosts, probe
from hpc_distkv.comm.together import together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.assign.source import RequestSource, SyncSource
from hpc_distkv.control.assign.work import kv_tokens
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.stop import TextDecoder
from hpc_distkv.errors import OptionError
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.config import dtype_name
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.follower import Follower
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.worker import Leader, Worker
from hpc_distkv.start.capacity import (
    KvShare,
    host_memory,
    lone_room,
    merged,
    node_room,
    pool_blocks,
    tier_blocks,
)
from hpc_distkv.start.host_costs import copy_seconds, staged_from
from hpc_distkv.start.loading import set_threads
from hpc_distkv.start.memory_limits import Room
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.graphs import decode_graphs, recordable
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.recorder import Recorder
from hpc_distkv.step.timesheet import TimeSheet


class RankEngine:
    """One rank of an SPMD job: every rank makes one, joins, and runs; rank 0 also leads."""

    def __init__(
        self,
        comm: Comm,
        model: Decoder,
        options: EngineOptions,
        decoder: TextDecoder | None = None,
        room: Room | None = None,
    ) -> None:
        """Lay out the pool. `model`: this rank's shard; `decoder`: the tokenizer, for requests
        with stop strings; `room` on the node, if other ranks were heard. Raises OptionError."""
        self.comm = comm
        room = room or lone_room(comm)
        self._decoder = decoder
        config = model.config
        set_threads(comm, options.threads)
        block_bytes = options.block_size * config.kv_bytes_per_token(dtype_name(model.dtype))
        policy = _policy(options.policy, comm.world.instances)
        wanted = EngineConfig(
            num_blocks=1,
            block_size=options.block_size,
            max_num_seqs=min(options.max_num_seqs, options.max_num_batched_tokens),
            max_num_batched_tokens=options.max_num_batched_tokens,
            policy=policy,
            lend_cap=options.lend_cap,
            move_budget=options.move_budget,
            window=0 if policy.migrate else config.widest_window,
            enable_prefix_caching=options.enable_prefix_caching,
            keys_by_length=model.needs_lengths,
            attention_tokens=config.attention_tokens,
            cuda_graphs=not options.enforce_eager
            and _recordable(model, comm.device.place, options.block_size),
            host_blocks=tier_blocks(
                comm, options.host_kv_memory, options.host_kv_path, block_bytes, room
            ),
        )
        blocks = pool_blocks(comm, model, options, wanted, block_bytes, room)
        self.config = replace(wanted, num_blocks=blocks)
        self.capacity_blocks = self.config.num_blocks
        """rBlocks that one request may use at most."""
        self._model = model
        self._links: LinkCosts | None = None
        blocks = self.config.num_blocks + self.config.spare
        try:
            self._pool = self._lay_out(blocks, comm.device.place)
        except RuntimeError as error:  # how torch says that memory is short
            raise OptionError(
                f"there is no memory for {self.config.num_blocks} rBlocks of {block_bytes} bytes: "
                "give less --num-blocks or --kv-memory"
            ) from error
        self._graphs = decode_graphs(model, self._pool, self._heads, self.config.cuda_graphs)
        """Of all runs."""
        self._host_pool: BlockPool | None = None
        if self.config.host_blocks:
            memory = host_memory(comm, self.config.host_blocks * block_bytes, options.host_kv_path)
            self._host_pool = self._lay_out(self.config.host_blocks, torch.device("cpu"), memory)

    def join(self) -> None:
        """Learn what the pools of all ranks hold together, and what links between ranks cost.
        Collective, once, before `run`. The ranks of an instance hold the same rBlocks, so its
        smallest pool counts."""
        config, world = self.config, self.comm.world
        if config.policy.sharing:
            block = self._pool.rblock(0).nbytes
            self._links = probe(self.comm, self._query_bytes(), block)
        lendable = 0
        if config.policy.lending:
            cap = config.num_blocks if config.lend_cap is None else config.lend_cap
            lendable = min(config.num_blocks, cap)
        ranks = self.comm.share(
            (config.num_blocks, lendable, config.host_blocks, *self._host_costs())
        )
        shares = [KvShare(*rank) for rank in ranks]
        instances = [merged(shares[i : i + world.tp]) for i in range(0, world.size, world.tp)]
        total = sum(each.lendable for each in instances)
        own = instances[world.instance]
        self.config = replace(
            config,
            num_blocks=own.blocks,
            host_blocks=own.host_blocks,
            host_copy_seconds=own.copy_seconds,
            host_staged_from=own.staged_from,
        )
        self.capacity_blocks = min(
            each.blocks + total - each.lendable + each.host_blocks for each in instances
        )

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
        return dtype_name(self._model.dtype)

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
        parts = Parts(
            self.comm,
            self._model,
            self._pool,
            self.config,
            self._heads,
            self._decoder,
            time,
            self._host_pool,
            self._graphs,
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
                f"request {request.id} may come to need the KV of {tokens} tokens "
                f"({request.prompt_len} of its prompt), but there is room for "
                f"{self.capacity_tokens}: give more --num-blocks or --host-kv-memory, or more ranks"
            )
        return request

    def _instance_links(self) -> Links:
        """Between the instances, with the costs of the probe if there was one: an exchange takes a
        round trip in every layer, and the bytes of its queries and partial results."""
        world, config = self.comm.world, self._model.config
        nodes = [world.node_of(instance) for instance in range(world.instances)]
        if self._links is None:
            return Links(nodes)
        row_bytes = self._query_bytes() + 4 * config.num_heads * (config.head_dim + 1)
        return Links(
            nodes,
            seconds=config.num_layers * np.array(self._links.round_trip),
            row_seconds=config.num_layers * row_bytes / np.array(self._links.bandwidth),
        )

    def _lay_out(
        self, blocks: int, place: torch.device, memory: torch.Tensor | None = None
    ) -> BlockPool:
        config, dtype = self._model.config, self._model.dtype
        sizes = (config.num_layers, config.num_kv_heads, self.config.block_size, config.head_dim)
        return BlockPool(blocks, *sizes, dtype, place, memory)

    def _host_costs(self) -> tuple[float, float]:
        """Seconds to copy an rBlock to the host's memory and back, and query rows from which it is
        copied to be attended to."""
        if self._host_pool is None:
            return 0.0, math.inf
        pools = self.comm, self._pool, self._host_pool
        rows = staged_from(*pools, self._heads[0], self._model.attention[0])
        return copy_seconds(*pools), rows

    @property
    def _heads(self) -> tuple[int, int]:
        """Query heads and head dimension of the shard."""
        return self._model.config.num_heads, self._model.config.head_dim

    def _query_bytes(self) -> int:
        """One query row of one layer."""
        config = self._model.config
        return config.num_heads * config.head_dim * self._model.dtype.itemsize


def joined(
    comm: Comm, model: Decoder, options: EngineOptions, decoder: TextDecoder | None = None
) -> RankEngine:
    """This rank's engine, once all ranks have theirs. Collective. Raises SetupError on all ranks
    if one cannot."""
    room = node_room(comm)  # All have their weights, and none a pool yet.
    engine = together(comm, lambda: RankEngine(comm, model, options, decoder, room))
    engine.join()
    return engine


def _recordable(model: Decoder, place: torch.device, block_size: int) -> bool:
    config = model.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q = torch.empty((1, heads, dim), dtype=model.dtype, device=place)
    k_cache = torch.empty((1, kv_heads, block_size, dim), dtype=model.dtype, device=place)
    return recordable(model, q, k_cache)


def _policy(policy: str | Policy, instances: int) -> Policy:
    """The policy by name; a lone instance has nobody to share with."""
    if instances == 1:
        return POLICIES["queue"]
    return POLICIES[policy] if isinstance(policy, str) else policy
