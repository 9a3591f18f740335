"""The records that travel between instances and the gManager, and between loan partners.

They are frozen msgspec structs: compact on the wire and checked when they are decoded, so a
malformed message is refused rather than obeyed. (`Counters` alone is mutable: an instance keeps
one and its reports carry what it holds then.) Blocks are counted in rBlocks, times are in
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


class Counters(msgspec.Struct):
    """What one instance has done since its start. Times are wall seconds of its rank."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, recomputed ones included."""
    generated_tokens: int = 0
    preemptions: int = 0
    refused_grants: int = 0
    blocks_lent: int = 0
    """rBlocks received from debtors."""
    blocks_borrowed: int = 0
    """rBlocks moved to creditors."""
    peak_borrowed: int = 0
    """Most rBlocks hosted elsewhere at once."""
    bytes_moved: int = 0
    bytes_queried: int = 0
    """Query vectors sent and partial results returned."""
    step_time: float = 0.0
    query_wait: float = 0.0
    """Waiting for guests' queries."""
    partial_wait: float = 0.0
    """Waiting for partial results from creditors."""
    header_wait: float = 0.0
    move_wait: float = 0.0
    control_wait: float = 0.0
    """Waiting at round boundaries, without work included."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """One partner to another before layer 0 of their joint step. Applied in this field order."""

    step: int
    """Joint steps of the pair's component since its last boundary: a check, not a clock."""
    released: list[int]
    """Requests of mine that ended: free their guests."""
    returned: int
    """Credit of mine that I give back."""
    opened: int
    """Credit I set aside for you."""
    moves: list[tuple[int, int]]
    """(request, logical index) of the rBlocks I send you behind this step's layers."""
    queries: list[tuple[int, int]]
    """(request, query rows) of mine that attend to their guests with you, in order of the rows."""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """One instance to the gManager at a round boundary."""

    round: int
    capacity: int
    """rBlocks in the pool."""
    free: int
    promised: int
    """rBlocks set aside until the answer: the most that may be granted."""
    wanted: int
    """rBlocks to borrow."""
    wanted_for: int
    """The oldest request that wants them; NOBODY when nothing is wanted."""
    starved: bool
    """`wanted_for` cannot go on, and no younger request at home could give way."""
    room_rows: int
    """Rows that may be assigned now."""
    room_tokens: int
    """Prompt tokens after which no further row should be assigned."""
    lent: dict[int, int]
    """Debtor → rBlocks lent or set aside."""
    held: dict[int, dict[int, int]]
    """Running request → instance → rBlocks, for those that changed; empty: holds nothing now."""
    results: list[Result]
    step_time: float
    """Expected seconds per step until the next boundary; 0 without work."""
    chunk_time: float
    """Recent seconds of a step that computes prompts; 0 if there was none yet."""
    counters: Counters


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """The gManager to one instance, in force from its next boundary."""

    round: int
    assign: list[Request]
    lend: dict[int, int]
    """Debtor → rBlocks of the promise to set aside for it."""
    granted: int
    """rBlocks of the wish that were granted: their creditors will open them as credit."""
    preempt: list[int]
    """Requests that give way to an older one elsewhere."""
    admit_before: int
    """Only requests older than this may be admitted; NOBODY: all."""
    partners: list[int]
    """The instances to exchange headers with from now on."""
    steps: int
    """Steps until the next boundary; 0: without partners, wherever the next answer finds it."""
    stop: bool


NOBODY = 2**62
"""Younger than any request."""
