"""The records that travel between instances and the gManager, and between loan partners.

All are frozen msgspec structs: compact on the wire and checked when they are decoded, so a
malformed message is refused rather than obeyed. Blocks are counted in rBlocks, times are in
seconds, token ids travel as little-endian int32.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids → bytes."""
    return np.fromiter(tokens, dtype="<i4").tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Bytes of `pack_tokens` → token ids."""
    tokens: list[int] = np.frombuffer(packed, dtype="<i4").tolist()
    return tokens


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one request are drawn, and when it ends."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """The request ends with any of these; the token itself is not part of the output."""


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One row to be answered. `id` is its place in the global order: lower is older."""

    id: int
    prompt: bytes
    """`pack_tokens` of the prompt; never empty."""
    sampling: Sampling

    @property
    def prompt_len(self) -> int:
        """Prompt tokens."""
        return len(self.prompt) // 4


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What became of one request."""

    id: int
    tokens: bytes
    """`pack_tokens` of the output, without the stop token."""
    finish_reason: str
    """"stop" or "length"."""
    first_token_time: float
    """Seconds from assignment to the first token."""
    total_time: float
    """Seconds from assignment to the last token."""
