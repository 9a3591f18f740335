"""Requests, how much work they are, and what becomes of them.

All records that travel between instances and the gManager, and between loan partners, are msgspec
structs, frozen but for `Counters` and `Answer`: compact on the wire and checked when they are
decoded, so a malformed message is refused rather than obeyed. Blocks are counted in rBlocks, times
are in seconds, token ids travel as little-endian int32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_distkv.ids import RequestId

NOT_FINITE = "not_finite"
"""The `finish_reason` of a request for which the model computed logits that are no numbers."""
UNREADABLE = "unreadable"
"""That of a request whose text cannot be searched for stop strings: the tokenizer fails."""
NOBODY = 2**62
"""Younger than any request."""


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids → bytes."""
    return np.fromiter(tokens, dtype="<i4").tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Bytes of `pack_tokens` → token ids."""
    tokens: list[int] = np.frombuffer(packed, dtype="<i4").tolist()
    return tokens


class LogitRules(msgspec.Struct, frozen=True, array_like=True):
    """What decides on a token beside temperature, top-k and top-p. Most requests have none."""

    repetition_penalty: float = 1.0
    """Of tokens in prompt or output: positive logits are divided by it, others multiplied."""
    frequency_penalty: float = 0.0
    """Subtracted for every time that the output has the token."""
    presence_penalty: float = 0.0
    """Subtracted once if the output has the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    withheld: tuple[int, ...] = ()
    """Token ids that cannot be drawn before the output has `min_tokens`."""
    min_p: float = 0.0
    """Tokens less probable than this part of the most probable one are not drawn."""

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far matter."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one request are drawn, and when it ends."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """The request ends with any of these."""
    min_tokens: int = 0
    """Output tokens before anything but `max_tokens` may end the request."""
    stop: tuple[str, ...] = ()
    """The request ends when its text has any of these."""
    include_stop: bool = False
    """Whether what ended the request, a stop token or string, is part of the text."""
    skip_special_tokens: bool = True
    """Whether the text leaves special tokens out."""
    logprobs: int | None = None
    """Most probable tokens to report beside each token; None: report no log-probabilities."""
    rules: LogitRules | None = None

    @property
    def min_p(self) -> float:
        """The least part of the most probable token's probability that a token must have."""
        return self.rules.min_p if self.rules else 0.0


class Request(msgspec.Struct, frozen=True, array_like=True):
    """What the engine answers: a prompt of the batch file, or one of its `n` choices. `id` is its
    place in the global order: lower is older."""

    id: RequestId
    prompt: bytes
    """`pack_tokens` of the prompt; never empty."""
    sampling: Sampling
    output: bytes = b""
    """`pack_tokens` of the output that an earlier run has made."""
    logprobs: bytes = b""
    """`pack_logprobs` of `output`, if the request asks for them."""

    @property
    def prompt_len(self) -> int:
        """Prompt tokens."""
        return len(self.prompt) // 4

    def prefix_keys(self, ends: Iterable[int], salt: bytes = b"") -> list[bytes]:
        """For each of `ends`, ascending: a key of the first `end` tokens, unique to them and the
        salt. Ends of which it is known that nobody shares them may be left out, with all beyond."""
        digest, begin = hashlib.blake2b(salt, digest_size=16), 0
        keys = []
        for end in ends:
            digest.update(memoryview(self.prompt)[4 * begin : 4 * end])
            keys.append(digest.copy().digest())
            begin = end
        return keys

    @property
    def length(self) -> int:
        """Tokens of the prompt and of an earlier run."""
        return self.prompt_len + len(self.output) // 4


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What became of one request."""

    id: int
    tokens: bytes
    """`pack_tokens` of the output, with the stop token that ended it."""
    finish_reason: str
    """"stop", "length", NOT_FINITE or UNREADABLE."""
    first_token_time: float
    """Seconds from assignment to the first token."""
    total_time: float
    """Seconds from assignment to the last token."""
    logprobs: bytes = b""
    """`pack_logprobs` of the output's tokens, if the request asked for them."""
    text_end: int | None = None
    """Characters of the output's text that belong to the answer, if a stop string ended it."""


class Unfinished(msgspec.Struct, frozen=True, array_like=True):
    """A request that a run was stopped before it could finish."""

    id: int
    output: bytes
    """`pack_tokens` of its output so far; never empty."""
    logprobs: bytes = b""
    """`pack_logprobs` of `output`, if the request asks for them."""


class TokenLogprobs(NamedTuple):
    """What the model thought of one place in the output, before any rule or temperature."""

    logprob: float
    """Of the token that is there; base e, as all of them."""
    top: list[tuple[int, float]]
    """(token id, its log-probability) of the most probable tokens, best first."""


def record_dtype(top: int) -> np.dtype[Any]:
    """One packed output token with `top` alternatives: 4 + 8 × `top` bytes, little-endian."""
    return np.dtype([("own", "<f4"), ("ids", "<i4", (top,)), ("values", "<f4", (top,))])


def pack_logprobs(
    own: NDArray[np.float32], ids: NDArray[np.int64], values: NDArray[np.float32]
) -> list[bytes]:
    """`own` `[rows]`, `ids` and `values` `[rows, top]` → a record for each row."""
    records = np.empty(len(own), record_dtype(ids.shape[1]))
    records["own"], records["ids"], records["values"] = own, ids, values
    return [record.tobytes() for record in records]


def unpack_logprobs(packed: bytes, top: int) -> list[TokenLogprobs]:
    """The records of an output's tokens, one after the other, → what they say."""
    records = np.frombuffer(packed, record_dtype(top))
    own, ids, values = (records[name].tolist() for name in ("own", "ids", "values"))
    return [
        TokenLogprobs(logprob, list(zip(row_ids, row_values, strict=True)))
        for logprob, row_ids, row_values in zip(own, ids, values, strict=True)
    ]


STEP_TOKENS = 16.0
"""Prompt tokens computed in the fixed time of a step, until it was measured."""


def work(start: int, end: float, attention_tokens: float) -> float:
    """Predicted work of the tokens from `start` to `end` of one request, in tokens' worth of linear
    layers: a token at position p also attends to p others, and `attention_tokens` of those cost as
    much as its linear layers."""
    tokens = max(0.0, end - start)
    return tokens * (1 + (start + end) / 2 / attention_tokens)


def kv_tokens(prompt: int, max_tokens: int) -> int:
    """Most tokens whose KV a request can need: the last output token needs none."""
    return prompt + max_tokens - 1


class MeanOutput:
    """What outputs of unfinished requests are expected to be: as large a part of their limits as
    those of finished ones."""

    def __init__(self) -> None:
        self._tokens = self._limits = 0

    def add(self, tokens: int, limit: int) -> None:
        """A request that might make `limit` output tokens ended with `tokens`."""
        self._tokens += tokens
        self._limits += limit

    def expected(self, limit: int) -> float:
        """Output tokens expected of a request that may make `limit`."""
        return limit * self._tokens / self._limits if self._limits else limit
