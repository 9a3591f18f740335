"""The memory of the host that a rank needs. No torch here, so that a job can be sized on a login
node, before it is submitted."""

from __future__ import annotations

from typing import NamedTuple

from hpc_distkv.control.assign.queue import LOOK_AHEAD, MOST_AHEAD, MOST_TOKENS_AHEAD
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.model.config import ModelConfig, dtype_bytes
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.largest_step import LargestStep
from hpc_distkv.units import size

PROGRAM = 384 << 20
"""Bytes of Python, torch and MPI in a rank on a CPU, and of what malloc keeps: 275 MiB measured
beside weights that were read."""
TOKENIZER_ENTRY = 1 << 10
"""Of a tokenizer for each token of its vocabulary: 0.8 KiB measured with 50k to 256k tokens."""
GPU_PROGRAM = 4 << 30
"""Likewise of a rank on a GPU, with CUDA's libraries and a tensor on its way there: assumed."""
USUAL_TOKENS = 1024
"""KV of a row where nobody says how large the KV cache is to be: assumed."""
ID_BYTES = 190
"""Of rank 0 for the custom_id of each row: what a rerun takes at most while it passes over what is
answered."""


class Memory(NamedTuple):
    """Bytes of the host's memory that a rank needs, by what takes them."""

    weights: int
    steps: int
    """The largest step, with what is exchanged with other ranks."""
    kv: int
    """The pool of rBlocks."""
    host: int
    """`--host-kv-memory`, unless it is a file."""
    input: int
    """On rank 0: rows that were read ahead, and their ids."""
    program: int
    """Python, its libraries and the tokenizer."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def words(self) -> str:
        """The sum, for people."""
        names = ("weights", "steps", "KV cache", "--host-kv-memory", "input read ahead", "program")
        parts = [f"{name} {size(part)}" for name, part in zip(names, self, strict=True) if part]
        return f"{' + '.join(parts)} = {size(self.total)}"


def rank_memory(
    config: ModelConfig,
    options: EngineOptions,
    *,
    instances: int = 1,
    first: bool = True,
    gpu: bool = False,
    rows: int = 0,
) -> Memory:
    """What a rank needs of its node's memory to answer batches with the whole model `config` under
    `options`, as one of so many `instances` (ranks over the tensor-parallel size).

    `first`: it is rank 0, which reads the input, of so many `rows`; `gpu`: weights, steps and pool
    are on a GPU. Where the options give neither rBlocks nor bytes for the KV cache, the pool holds
    `max_num_seqs` rows of `USUAL_TOKENS`; a rank on a CPU takes what it finds. Raises ModelError
    for a dtype that is none.
    """
    shard = config.shard(options.tensor_parallel_size)
    return shard_memory(shard, options, instances=instances, first=first, gpu=gpu, rows=rows)


def shard_memory(
    shard: ModelConfig,
    options: EngineOptions,
    *,
    instances: int,
    first: bool,
    gpu: bool,
    rows: int = 0,
) -> Memory:
    """As `rank_memory`, of a rank whose shard of the model is described by `shard`."""
    itemsize = dtype_bytes(dtype_of(shard, options))
    block = options.block_size * shard.kv_bytes_per_token(dtype_of(shard, options))
    weights = steps = kv = 0
    if not gpu:
        step = _largest_step(options, instances)
        weights = itemsize * shard.num_weights(options.tensor_parallel_size, packed=True)
        steps = step.computed_on_cpu(shard) + step.exchanged(shard, itemsize) + step.tables(shard)
        kv = (options.num_blocks or 0) * block or options.kv_memory or usual_kv(options, block)
    return Memory(
        weights,
        steps,
        kv,
        0 if options.host_kv_path else options.host_kv_memory or 0,
        _input(shard, instances) + ID_BYTES * rows if first else 0,
        (GPU_PROGRAM if gpu else PROGRAM) + TOKENIZER_ENTRY * shard.vocab_size,
    )


def usual_kv(options: EngineOptions, block_bytes: int) -> int:
    """Bytes of a pool that holds `max_num_seqs` rows of `USUAL_TOKENS`."""
    return options.max_num_seqs * -(-USUAL_TOKENS // options.block_size) * block_bytes


def loading_memory(config: ModelConfig, options: EngineOptions) -> int:
    """Bytes that are needed beside the weights while these are read: twice the largest tensor, as
    it is stored and in the order of the kernels."""
    shard = config.shard(options.tensor_parallel_size)
    widest = max(shard.vocab_size, 2 * shard.intermediate_size)
    return 2 * widest * shard.hidden_size * dtype_bytes(dtype_of(config, options))


def dtype_of(config: ModelConfig, options: EngineOptions) -> str:
    """Of weights and KV."""
    return config.dtype if options.dtype == "auto" else options.dtype


def _largest_step(options: EngineOptions, instances: int) -> LargestStep:
    policy = options.policy
    named = policy if isinstance(policy, Policy) else POLICIES[policy]
    return LargestStep(
        tokens=options.max_num_batched_tokens,
        rows=min(options.max_num_seqs, options.max_num_batched_tokens),
        block_size=options.block_size,
        others=instances - 1 if named.lending else 0,
        shares=options.enable_prefix_caching,
    )


def _input(config: ModelConfig, instances: int) -> int:
    """Tokens that were read ahead, of 4 bytes."""
    rows = min(instances * LOOK_AHEAD, MOST_AHEAD)
    return 4 * min(MOST_TOKENS_AHEAD, rows * config.max_position)
