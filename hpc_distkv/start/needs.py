"""The host memory that a rank needs, and whether it has as much. No torch here, so that a job can
be sized on a login node, before it is submitted."""

from __future__ import annotations

from typing import NamedTuple

from hpc_distkv.control.assign.queue import LOOK_AHEAD, MOST_AHEAD, MOST_TOKENS_AHEAD
from hpc_distkv.control.policy import Policy
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig, dtype_bytes
from hpc_distkv.start.memory_limits import Room
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.sizes import LargestStep
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
GIVEN_SHARE = 0.9
"""Part of what a rank has left beside all else that its pool takes unless told otherwise, where
memory was given to the job: the rest is for what was counted too low."""
FOUND_SHARE = 0.4
"""The same on a machine that others may be using too."""


class Memory(NamedTuple):
    """Bytes of host memory that a rank needs, by use."""

    weights: int
    steps: int
    """The largest step, with what is exchanged with other ranks."""
    kv: int
    """The pool of rBlocks."""
    host: int
    """`--host-kv-memory`, unless it is a file."""
    input: int
    """On rank 0: rows that are read ahead, and their ids."""
    program: int
    """Python, its libraries and the tokenizer."""

    @property
    def total(self) -> int:
        """The sum."""
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
        policy, shares = options.policy_among(instances), options.enable_prefix_caching
        step = largest_step(options, policy, instances, shares=shares)
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


def largest_step(
    options: EngineOptions,
    policy: Policy,
    instances: int,
    *,
    shares: bool,
    recorded: bool = False,
    stages: bool = False,
) -> LargestStep:
    """The largest step of a rank, one of so many `instances`; the rest as of `LargestStep`."""
    return LargestStep(
        tokens=options.max_num_batched_tokens,
        rows=min(options.max_num_seqs, options.max_num_batched_tokens),
        block_size=options.block_size,
        # The host's processor attends for this rank, as a creditor does.
        others=(instances - 1 if policy.lending else 0) + stages,
        shares=shares,
        recorded=recorded,
        stages=stages,
    )


def _input(config: ModelConfig, instances: int) -> int:
    """Tokens that were read ahead, of 4 bytes."""
    rows = min(instances * LOOK_AHEAD, MOST_AHEAD)
    return 4 * min(MOST_TOKENS_AHEAD, rows * config.max_position)


class Budget(NamedTuple):
    """The memory that a rank on a CPU needs, and what it may use."""

    memory: Memory
    """Without the pool."""
    room: Room

    @property
    def taken(self) -> int:
        """Bytes of weights and program, resident or to come."""
        return max(self.room.resident, self.memory.weights + self.memory.program)

    @property
    def rest(self) -> int:
        """Bytes that are left for a pool."""
        others = self.memory.steps + self.memory.host + self.memory.input
        return max(0, self.room.most - self.taken - others)

    def pool(self, wanted: int | None, block_bytes: int) -> int:
        """Bytes of the pool: as many as are `wanted`, or a share of what there is. Raises
        OptionError, with the sum, if there is no room for them, or for one rBlock."""
        if wanted is None:
            share = GIVEN_SHARE if self.room.given else FOUND_SHARE
            wanted = max(block_bytes, int(share * self.rest))
        if wanted > self.rest:
            raise OptionError(self._refusal(wanted, block_bytes))
        return wanted

    def _refusal(self, wanted: int, block_bytes: int) -> str:
        program = self.taken - self.memory.weights
        needed = self.memory._replace(kv=wanted, program=program)
        limit, sharing = self.room.limit, self.room.sharing
        ranks = f"each of {sharing} ranks" if sharing > 1 else "it"
        if self.rest >= block_bytes:
            advice = (
                f"give --kv-memory {self.rest >> 20}MiB or --num-blocks {self.rest // block_bytes} "
                "at most, or the job more memory"
            )
        else:
            advice = (
                "give the job more memory (--mem of sbatch), a node fewer ranks, a replica more "
                "(--tensor-parallel-size), or less --max-num-batched-tokens, --max-num-seqs or "
                "--host-kv-memory"
            )
        return (
            f"a rank needs {needed.words()}, but {limit.name} has {size(limit.most)}, which leaves "
            f"{ranks} {size(self.room.most)}: {advice}"
        )


def wanted_bytes(options: EngineOptions, block_bytes: int) -> int | None:
    """Bytes of a rank's pool as the options give them; None if they do not. Raises OptionError if
    they hold no rBlock."""
    wanted = options.num_blocks * block_bytes if options.num_blocks else options.kv_memory
    if wanted is not None and wanted < block_bytes:
        raise OptionError(
            f"one rBlock takes {block_bytes} bytes, but there are {wanted} bytes for the KV "
            "cache: give more --kv-memory or a smaller --block-size"
        )
    return wanted
