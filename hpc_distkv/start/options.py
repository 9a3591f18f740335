"""What a user may choose about an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints

from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import DTYPE_BYTES

MOST_THREADS = 1024
"""Compute threads of a rank: no node has more cores for it."""
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "transport": ("auto", "nccl", "mpi"),
    "dtype": ("auto", *DTYPE_BYTES),
    "policy": tuple(POLICIES),
    "load_format": ("auto", "broadcast", "dummy"),
}
"""What options may be that are one of a few words."""
_FROM_ZERO = ("move_budget", "lend_cap")


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose about an engine. Sizes are per rank. Raises OptionError."""

    device: str = "auto"
    """What ranks compute on: "cuda", "cpu", or "auto", a GPU where there is one."""
    allow_gpu_sharing: bool = False
    """Whether ranks may share a GPU."""
    transport: str = "auto"
    """Between GPUs: "nccl", "mpi" (by way of the host), or "auto", NCCL where it can be."""
    gpu_memory_utilization: float = 0.9
    """Part of the GPU's memory that is free beside the weights which steps and pool may take."""
    enforce_eager: bool = False
    """Never record decode steps as CUDA graphs."""
    dtype: str = "auto"
    """Of weights, activations and KV: "auto" is the checkpoint's."""
    num_blocks: int | None = None
    """rBlocks in the pool; None: as many as `kv_memory` holds."""
    kv_memory: int | None = None
    """Bytes for the pool; None: a share of the memory that is available."""
    host_kv_memory: int | None = None
    """Bytes of the host's memory for rBlocks that the pool has no room for; None: none."""
    host_kv_path: str | None = None
    """Directory on a disk of the node for a file that takes the place of that memory."""
    block_size: int = EngineConfig.block_size
    max_num_seqs: int = EngineConfig.max_num_seqs
    max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens
    policy: str | Policy = "lend"
    """How ranks share memory: one of `control.policy.POLICIES`."""
    enable_prefix_caching: bool = True
    """Rows with equal prefixes compute these once on each instance, and share their rBlocks."""
    move_budget: int = EngineConfig.move_budget
    """KV tokens that may move in a step though no row waits for them."""
    lend_cap: int | None = None
    """Most rBlocks that a rank lends to others; None: all of its pool."""
    threads: int | None = None
    """Compute threads; None: this rank's share of the cores it may run on."""
    tensor_parallel_size: int = 1
    """Consecutive ranks that hold one replica of the model together."""
    load_format: str = "auto"
    """How weights get to the ranks: "auto": every rank reads its own shard; "broadcast": the first
    instance reads, and hands each shard on to the ranks that hold the same one; "dummy": they are
    random, and only the model's configuration is read."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check(name, getattr(self, name), kind)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise OptionError(
                f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}"
            )
        if (self.threads or 1) > MOST_THREADS:
            raise OptionError(f"threads must be at most {MOST_THREADS}, not {self.threads}")
        if self.num_blocks is not None and self.kv_memory is not None:
            raise OptionError("num_blocks and kv_memory say the same: give one of them")

    def policy_among(self, instances: int) -> Policy:
        """The policy by name; a lone instance has nobody to share with."""
        if instances == 1:
            return POLICIES["queue"]
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    @property
    def dummy(self) -> bool:
        """Whether weights are random."""
        return self.load_format == "dummy"


def _check(name: str, value: Any, kind: Any) -> None:
    """The value of one option. Raises OptionError."""
    fits = isinstance(value, float | int if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{name} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    least = 0 if name in _FROM_ZERO else 1
    if kind in (int, int | None) and value is not None and value < least:
        raise OptionError(f"{name} must be at least {least}, not {value}")
    choices = CHOICES.get(name)
    if choices and isinstance(value, str) and value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
