"""A rank's pools for KV: laid out by the rank alone, then measured and shared by all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.policy import Policy
from hpc_distkv.decide.config import EngineConfig, shares_prefixes
from hpc_distkv.errors import OptionError
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.config import dtype_name
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.start.capacity import KvShare, host_memory, merged, pool_blocks, tier_blocks
from hpc_distkv.start.host_costs import copy_seconds, staged_from
from hpc_distkv.start.loading import set_threads
from hpc_distkv.start.memory_limits import Room
from hpc_distkv.start.needs import largest_step
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.graphs import recordable
from hpc_distkv.step.model import QueryHeads


@dataclass(frozen=True)
class Layout:
    """One rank's shard of the model and its pools, before it has heard of other ranks' pools."""

    comm: Comm
    model: Decoder
    options: EngineOptions
    policy: Policy
    recorded: bool
    """Whether decode steps are recorded as CUDA graphs."""
    pool: BlockPool
    """With one rBlock more than requests use if steps are recorded: padding rows write to it."""
    host_pool: BlockPool | None
    """rBlocks in the host's memory."""

    @property
    def num_blocks(self) -> int:
        """rBlocks of the pool that requests use."""
        return self.pool.num_blocks - self.recorded

    @property
    def heads(self) -> QueryHeads:
        """Those of the shard."""
        return QueryHeads(self.model.config.num_heads, self.model.config.head_dim)

    @property
    def query_bytes(self) -> int:
        """Bytes of one query row of one layer."""
        return math.prod(self.heads) * self.model.dtype.itemsize

    def shared(self) -> list[KvShare]:
        """What every instance has for KV, by instance. Collective."""
        world, lendable = self.comm.world, 0
        if self.policy.lending:
            cap = self.options.lend_cap
            lendable = self.num_blocks if cap is None else min(self.num_blocks, cap)
        host_blocks = self.host_pool.num_blocks if self.host_pool else 0
        own = KvShare(self.num_blocks, lendable, host_blocks, *self._host_costs())
        ranks = [KvShare(*rank) for rank in self.comm.share(own)]
        return [merged(ranks[i : i + world.tp]) for i in range(0, world.size, world.tp)]

    def config(self, own: KvShare) -> EngineConfig:
        """The settings of this rank's instance, which has its `own` share."""
        options, model = self.options, self.model
        return EngineConfig(
            num_blocks=own.blocks,
            block_size=options.block_size,
            max_num_seqs=min(options.max_num_seqs, options.max_num_batched_tokens),
            max_num_batched_tokens=options.max_num_batched_tokens,
            policy=self.policy,
            lend_cap=options.lend_cap,
            move_budget=options.move_budget,
            window=_window(model, self.policy),
            enable_prefix_caching=options.enable_prefix_caching,
            keys_by_length=model.needs_lengths,
            attention_tokens=model.config.attention_tokens,
            host_blocks=own.host_blocks,
            host_copy_seconds=own.copy_seconds,
            host_staged_from=own.staged_from,
        )

    def _host_costs(self) -> tuple[float, float]:
        """Seconds to copy an rBlock to the host's memory and back, and query rows from which it is
        copied to be attended to."""
        if self.host_pool is None:
            return 0.0, math.inf
        pools = self.comm, self.pool, self.host_pool
        rows = staged_from(*pools, self.heads.num_heads, self.model.attention[0])
        return copy_seconds(*pools), rows


def lay_out(comm: Comm, model: Decoder, options: EngineOptions, room: Room) -> Layout:
    """Lay out the pools of this rank, as large as options and memory allow. `model`: its shard;
    `room`: on its node. Raises OptionError."""
    set_threads(comm, options.threads)
    instances, config = comm.world.instances, model.config
    policy = options.policy_among(instances)
    block_bytes = options.block_size * config.kv_bytes_per_token(dtype_name(model.dtype))
    recorded = not options.enforce_eager and _recordable(
        model, comm.device.place, options.block_size
    )
    host_blocks = tier_blocks(comm, options.host_kv_memory, options.host_kv_path, block_bytes, room)
    window = _window(model, policy)
    step = largest_step(
        options,
        policy,
        instances,
        shares=shares_prefixes(options.enable_prefix_caching, policy, window),
        recorded=recorded,
        stages=bool(host_blocks),
    )
    blocks = pool_blocks(comm, model, options, step, block_bytes, room)
    sizes = config.num_layers, config.num_kv_heads, options.block_size, config.head_dim
    try:
        pool = BlockPool(blocks + recorded, *sizes, model.dtype, comm.device.place)
    except RuntimeError as error:  # how torch says that memory is short
        raise OptionError(
            f"there is no memory for {blocks} rBlocks of {block_bytes} bytes: "
            "give less --num-blocks or --kv-memory"
        ) from error
    host_pool: BlockPool | None = None
    if host_blocks:
        memory = host_memory(comm, host_blocks * block_bytes, options.host_kv_path)
        host_pool = BlockPool(host_blocks, *sizes, model.dtype, torch.device("cpu"), memory)
    return Layout(comm, model, options, policy, recorded, pool, host_pool)


def _window(model: Decoder, policy: Policy) -> int:
    """As of `EngineConfig`."""
    return 0 if policy.migrate else model.config.widest_window


def _recordable(model: Decoder, place: torch.device, block_size: int) -> bool:
    config = model.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q = torch.empty((1, heads, dim), dtype=model.dtype, device=place)
    k_cache = torch.empty((1, kv_heads, block_size, dim), dtype=model.dtype, device=place)
    return recordable(model, q, k_cache)
