"""The engine of one rank: model shard and block pool, and the worker that runs on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hpc_distkv.attention import flashinfer
from hpc_distkv.comm import binding
from hpc_distkv.comm.broadcast import LaneBroadcast
from hpc_distkv.comm.device import DeviceError
from hpc_distkv.comm.group import Group
from hpc_distkv.comm.probe import LinkCosts, probe
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.links import Links
from hpc_distkv.control.messages import Request
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.control.work import kv_tokens
from hpc_distkv.engine.activations import LargestStep, activation_peak, free_memory
from hpc_distkv.engine.capacity import device_blocks, host_blocks, tier_blocks
from hpc_distkv.engine.config import EngineConfig, OptionError
from hpc_distkv.engine.follower import Follower
from hpc_distkv.engine.graphs import decode_graphs, recordable
from hpc_distkv.engine.host_costs import copy_seconds, staged_from
from hpc_distkv.engine.interrupt import Interrupt
from hpc_distkv.engine.lane import Parts
from hpc_distkv.engine.options import EngineOptions
from hpc_distkv.engine.recorder import Recorder
from hpc_distkv.engine.stop import TextDecoder
from hpc_distkv.engine.timesheet import TimeSheet
from hpc_distkv.engine.worker import Leader, Worker
from hpc_distkv.memory.mapped import mapped_memory
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.shard import Shard
from hpc_distkv.model.weights import load_decoder, random_decoder


class RankEngine:
    """One rank of an SPMD job: every rank makes one, joins, and runs; rank 0 also leads."""

    def __init__(
        self,
        comm: Comm,
        model: Decoder,
        options: EngineOptions,
        decoder: TextDecoder | None = None,
    ) -> None:
        """Lay out the pool. `model`: this rank's shard; `decoder`: the tokenizer, for requests
        with stop strings. Raises OptionError."""
        self.comm = comm
        self._decoder = decoder
        config = model.config
        set_threads(comm, options.threads)
        block_bytes = options.block_size * config.kv_bytes_per_token(_name(model.dtype))
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
                comm, options.host_kv_memory, options.host_kv_path, block_bytes
            ),
        )
        blocks = _blocks_that_fit(comm, model, options, wanted, block_bytes)
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
            self._host_pool = self._host_tier(self.config.host_blocks * block_bytes, options)

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
        costs = self._host_costs()
        ranks = self.comm.share((config.num_blocks, lendable, config.host_blocks, *costs))
        pools = [
            tuple(map(min, zip(*ranks[first : first + world.tp], strict=True)))
            for first in range(0, world.size, world.tp)
        ]
        total = sum(lends for _, lends, *_ in pools)
        own, _, host, copying, rows = pools[world.instance]
        self.config = replace(
            config,
            num_blocks=own,
            host_blocks=host,
            host_copy_seconds=-copying,
            host_staged_from=-rows,
        )
        self.capacity_blocks = min(own + total - lends + host for own, lends, host, *_ in pools)

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
        return _name(self._model.dtype)

    def run(
        self,
        leader: Leader | None = None,
        recorder: Recorder | None = None,
        interrupt: Interrupt | None = None,
    ) -> Worker | Follower:
        """Work until all requests of rank 0's leader are answered, or `interrupt` of any rank ends
        the run. Collective; `leader` is given on rank 0 alone; `recorder`: is told when what
        happens here. Raises StallError, ProtocolError, and what the leader raises."""
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
        time.fill(worker.counters)
        return worker

    def gmanager(self, requests: Iterator[Request | None]) -> GManager:
        """The gManager for a run over `requests`: rank 0's leader owns one."""
        world, config = self.comm.world, self.config
        nodes = [world.node_of(instance) for instance in range(world.instances)]
        measured = np.array(self._links.round_trip) if self._links else None
        links = Links(nodes, seconds=measured)
        return GManager(
            self._fitting(requests),
            links,
            len(nodes),
            config.policy,
            block_size=config.block_size,
            move_budget=config.move_budget,
            attention_tokens=config.attention_tokens,
            prefix_caching=config.prefix_caching,
            exchange_seconds=self._exchange_seconds(links),
        )

    def _exchange_seconds(self, links: Links) -> Callable[[int, int], float]:
        """(link class, query rows) → seconds that exchanges over such a link add to a step, from
        the probe: every layer a round trip, and the bytes of queries and partial results."""
        if self._links is None or len(self._links.round_trip) < 2:
            return lambda link_class, rows: 0.0
        config = self._model.config
        row_bytes = self._query_bytes() + 4 * config.num_heads * (config.head_dim + 1)
        slowest: dict[int, tuple[float, float]] = {}
        for a, times in enumerate(self._links.round_trip):
            for b, seconds in enumerate(times[:a]):
                per_row = row_bytes / self._links.bandwidth[a][b]
                worst = slowest.get(links.between(a, b), (0.0, 0.0))
                slowest[links.between(a, b)] = max(worst[0], seconds), max(worst[1], per_row)
        return lambda link_class, rows: (
            config.num_layers * (slowest[link_class][0] + rows * slowest[link_class][1])
        )

    def _lay_out(
        self, blocks: int, place: torch.device, memory: torch.Tensor | None = None
    ) -> BlockPool:
        config, dtype = self._model.config, self._model.dtype
        sizes = (config.num_layers, config.num_kv_heads, self.config.block_size, config.head_dim)
        return BlockPool(blocks, *sizes, dtype, place, memory)

    def _host_tier(self, size: int, options: EngineOptions) -> BlockPool:
        """rBlocks in the host's memory. Raises OptionError."""
        folder = options.host_kv_path
        try:
            if folder is not None:
                memory = mapped_memory(size, Path(folder))
            else:
                memory = torch.empty(size, dtype=torch.uint8)
            self.comm.device.pin(memory)
        except OSError as error:
            raise OptionError(
                f"--host-kv-path {folder}: no file of {size} bytes can be made there "
                f"({error.strerror}): give another directory, or less --host-kv-memory"
            ) from error
        except RuntimeError as error:
            raise OptionError(
                f"the host has no memory for --host-kv-memory ({error}): give less"
            ) from error
        return self._lay_out(self.config.host_blocks, torch.device("cpu"), memory)

    def _host_costs(self) -> tuple[float, float]:
        """Less than nothing, for the dearest of an instance counts: seconds to copy an rBlock to
        the host's memory and back, and query rows from which it is copied to be attended to."""
        if self._host_pool is None:
            return 0.0, -math.inf
        pools = self.comm, self._pool, self._host_pool
        spec = self._model.attention[0]
        rows = staged_from(*pools, self._heads[0], spec)
        return -copy_seconds(*pools), -rows

    @property
    def _heads(self) -> tuple[int, int]:
        """Query heads and head dimension of the shard."""
        return self._model.config.num_heads, self._model.config.head_dim

    def _query_bytes(self) -> int:
        """One query row of one layer."""
        config = self._model.config
        return config.num_heads * config.head_dim * self._model.dtype.itemsize

    def _fitting(self, requests: Iterator[Request | None]) -> Iterator[Request | None]:
        """The requests as they are; one that could never end is refused before it starts."""
        for request in requests:
            if request is None:
                yield None
                continue
            tokens = kv_tokens(request.prompt_len, request.sampling.max_tokens)
            if tokens > self.capacity_tokens:
                raise OptionError(
                    f"request {request.id} may come to need the KV of {tokens} tokens "
                    f"({request.prompt_len} of its prompt), but there is room for "
                    f"{self.capacity_tokens}: give more --num-blocks or --host-kv-memory, or more "
                    "ranks"
                )
            yield request


def bind(comm: Comm, options: EngineOptions) -> None:
    """Give every rank its device. Collective, before the model is loaded. Raises OptionError."""
    try:
        binding.bind(comm, options.device, options.allow_gpu_sharing, options.transport)
    except DeviceError as error:
        raise OptionError(str(error)) from None
    by_flashinfer = options.attention_backend == flashinfer.BACKEND
    if comm.device.place.type != "cuda":
        for option, given in {
            "--attention-backend flashinfer": by_flashinfer,
            "--transport nccl": options.transport == "nccl",
            "--allow-gpu-sharing": options.allow_gpu_sharing,
        }.items():
            if given:
                raise OptionError(f"{option} cannot be: it needs GPUs")
    elif by_flashinfer and (why_not := flashinfer.missing()):
        raise OptionError(f"--attention-backend flashinfer cannot be: {why_not}")


def unite(comm: Comm) -> None:
    """Connect the ranks of this one's instance with each other. Collective: when all have loaded
    their shards, for a rank that cannot would keep the others waiting; and before pools take the
    memory that is left. Raises NcclError."""
    if comm.world.tp > 1:
        comm.transport.unite(comm)


def load_model(comm: Comm, path: str | Path, options: EngineOptions) -> Decoder:
    """Cut the ranks into instances, and load this rank's shard of the decoder in model directory
    `path`. All ranks call it. Raises OptionError and ModelError."""
    try:
        comm.form_instances(options.tensor_parallel_size)
    except ValueError as error:
        raise OptionError(f"--tensor-parallel-size: {error}") from None
    set_threads(comm, options.threads)
    world = comm.world
    config, shard = ModelConfig.from_dir(path, options.dummy), Shard(world.lane, world.tp)
    dtype = None if options.dtype == "auto" else options.dtype
    try:
        if options.dummy:
            decoder = random_decoder(config, dtype, world.lane, comm.device.place, shard)
        else:
            relay = LaneBroadcast(comm) if options.load_format == "broadcast" else None
            decoder = load_decoder(path, config, dtype, comm.device.place, shard, relay)
    except torch.OutOfMemoryError as error:
        raise OptionError(
            "the GPU has no room for the weights: give more ranks to a replica "
            f"(--tensor-parallel-size, now {world.tp})"
        ) from error
    if world.tp > 1:
        decoder.lanes = Group(comm)
    if options.attention_backend != "auto":
        backend = options.attention_backend
        decoder.attention = [replace(spec, backend=backend) for spec in decoder.attention]
    return decoder


def set_threads(comm: Comm, threads: int | None) -> None:
    """Give torch this rank's share of the cores; launchers often leave it one, or all."""
    torch.set_num_threads(threads or max(1, int(comm.world.cores)))


def _blocks_that_fit(
    comm: Comm, model: Decoder, options: EngineOptions, config: EngineConfig, block_bytes: int
) -> int:
    if comm.device.place.type == "cpu":
        return options.num_blocks or host_blocks(comm, options.kv_memory, block_bytes)
    wanted = options.num_blocks * block_bytes if options.num_blocks else options.kv_memory
    if options.allow_gpu_sharing and wanted is None:
        raise OptionError(
            "ranks that share a GPU cannot see what the others will take: give --kv-memory or "
            "--num-blocks with --allow-gpu-sharing"
        )
    others = comm.world.instances - 1 if config.policy.lending else 0
    if config.host_blocks:
        others += 1  # The host's processor attends for this rank, as a creditor does.
    step = LargestStep(
        tokens=config.max_num_batched_tokens,
        rows=config.max_num_seqs,
        block_size=config.block_size,
        others=others,
        shares=config.prefix_caching,
        recorded=config.cuda_graphs,
        stages=bool(config.host_blocks),
    )
    try:
        peak = activation_peak(model, comm.device, step)
    except flashinfer.FlashInferError as error:
        raise OptionError(f"--attention-backend flashinfer cannot be: {error}") from error
    peak += config.spare * block_bytes  # beyond the pool
    free = free_memory(comm.device)
    return device_blocks(
        free, peak, options.gpu_memory_utilization, wanted, block_bytes, step.tokens
    )


def _recordable(model: Decoder, place: torch.device, block_size: int) -> bool:
    config = model.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q = torch.empty((1, heads, dim), dtype=model.dtype, device=place)
    k_cache = torch.empty((1, kv_heads, block_size, dim), dtype=model.dtype, device=place)
    return recordable(model, q, k_cache)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _policy(policy: str | Policy, instances: int) -> Policy:
    """The policy by name; a lone instance has nobody to share with."""
    if instances == 1:
        return POLICIES["queue"]
    return POLICIES[policy] if isinstance(policy, str) else policy
