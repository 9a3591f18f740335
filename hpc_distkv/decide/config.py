"""The settings of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hpc_distkv.control.messages.requests import Request
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.errors import OptionError


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of one instance; the same on all ranks but for `num_blocks`."""

    num_blocks: int
    block_size: int = 32
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    policy: Policy = POLICIES["lend"]
    lend_cap: int | None = None
    """Most rBlocks lent to others; None: all."""
    move_budget: int = 16
    """KV tokens that may move in a step though no sequence waits for them."""
    window: int = 0
    """Tokens that a query sees, its own included; rBlocks behind them are freed. 0: none are,
    because some layer sees all tokens, or because requests that migrate are copied whole."""
    enable_prefix_caching: bool = False
    """Sequences with equal prefixes share the sealed rBlocks of these: see `prefix_caching`."""
    keys_by_length: bool = False
    """Only sequences with prompts of one length do, for the length decides on K (dynamic RoPE)."""
    attention_tokens: float = float("inf")
    """Context length at which a token costs twice what its linear layers cost."""

    host_blocks: int = 0
    """rBlocks in the host's memory; 0: it is not used."""
    host_copy_seconds: float = 0.0
    """Measured time in which an rBlock goes there and comes back."""
    host_staged_from: float = float("inf")
    """Query rows from which, by measured times, the device attends to copies of rBlocks there, and
    not the host's processor in place."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def prefix_caching(self) -> bool:
        """Whether sequences share rBlocks."""
        return shares_prefixes(self.enable_prefix_caching, self.policy, self.window)

    def prefix_keys(self, request: Request) -> list[bytes]:
        """The keys of the rBlocks of a prompt that may be shared: all before that of its last
        token, which has to be computed."""
        if not self.prefix_caching:
            return []
        length = request.prompt_len
        salt = length.to_bytes(8, "little") if self.keys_by_length else b""
        return request.prefix_keys(range(self.block_size, length, self.block_size), salt)

    @cached_property
    def reserve(self) -> int:
        """rBlocks that stay free when a sequence is admitted, for those that run to grow into."""
        chunk = self.blocks(self.max_num_batched_tokens)
        return min(chunk, max(1, self.num_blocks // 100))

    @cached_property
    def first_chunk(self) -> int:
        """rBlocks that are not lent unless a sequence starves, at least `reserve`: requests
        assigned here begin in them."""
        chunk = self.blocks(self.max_num_batched_tokens)
        return min(chunk, max(1, self.num_blocks // 8))

    def blocks(self, tokens: int) -> int:
        """rBlocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)


def shares_prefixes(enabled: bool, policy: Policy, window: int) -> bool:
    """True if sequences share rBlocks. They do not where rBlocks are freed behind a window or
    copied with a request that migrates: there one sequence decides about them."""
    return enabled and not window and not policy.migrate
