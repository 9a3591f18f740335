"""A request while it is being answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpc_distkv.control.messages.requests import (
    NOT_FINITE,
    UNREADABLE,
    Request,
    kv_tokens,
    pack_tokens,
    record_dtype,
    unpack_tokens,
)
from hpc_distkv.decide.stop import StopMatcher, TextDecoder
from hpc_distkv.errors import ForeignError
from hpc_distkv.ids import RequestId


class TokenCounts:
    """How often the output of one request has each token, and which ones its prompt has. Follows
    from the tokens, and counts only those that are new since the last look."""

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._read = 0
        self._seen: set[int] = set()
        self._output: Counter[int] = Counter()

    def read(self, tokens: SequenceOf[int]) -> None:
        """`tokens`: of prompt and output so far, more or as many as in the last call; a last one
        that is not known yet (see `TokenSequence.expect`) is left for the next call."""
        end = len(tokens) - (tokens[-1] < 0)
        self._seen.update(tokens[self._read : end])
        self._output.update(tokens[max(self._read, self._prompt_len) : end])
        self._read = end

    @property
    def seen(self) -> npt.NDArray[np.int64]:
        """int64 ids of the tokens in prompt or output."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    @property
    def output(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """int64 ids of the tokens in the output, and float32 times that they are there."""
        ids = np.fromiter(self._output.keys(), np.int64, len(self._output))
        times = np.fromiter(self._output.values(), np.float32, len(self._output))
        return ids, times


class Sequence(Protocol):
    """A request while it runs: what the scheduler and the instance need of it. None of that depends
    on which tokens it has, only on how many."""

    request: Request
    assigned_at: float
    id: RequestId
    """Place in the global order; lower is older."""
    prompt_len: int
    """Prompt tokens."""
    final_len: int
    """Most tokens whose KV this request can need."""
    keys: list[bytes]
    """Of the rBlocks of the prompt that may be shared."""
    computed: int
    """Tokens that have their KV in rBlocks."""
    first_token_at: float | None
    last_token_at: float | None

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""

    @property
    def remaining(self) -> int:
        """Tokens whose KV is missing; 1 in decode."""

    @property
    def output_len(self) -> int:
        """Output tokens so far."""

    @property
    def fresh(self) -> bool:
        """Whether it has made no token yet, in this run."""

    def expect(self, place: int) -> None:
        """One more output token, which is not known yet: of those that its step draws, the one at
        `place`."""

    def learn(self, token: int, now: float, logprobs: bytes = b"") -> None:
        """The token that was expected, and its record if the request asks for logprobs."""

    def finish_reason(self) -> str | None:
        """Why the request ends with its last token; None: it goes on."""

    @property
    def text_end(self) -> int | None:
        """Characters of the output's text that belong to the answer, if a stop string ended it."""

    @property
    def packed(self) -> bytes:
        """Prompt and output so far, for `restore`."""

    @property
    def packed_output(self) -> bytes:
        """`pack_tokens` of the output so far."""

    @property
    def packed_logprobs(self) -> bytes:
        """The records of the tokens in `packed_output`, if the request asks for logprobs."""

    def restore(self, packed: bytes, computed: int, logprobs: bytes = b"") -> None:
        """Go on where another instance left off."""


@dataclass(eq=False)
class TokenSequence:
    """A `Sequence` with its tokens. Beside its logprobs, all that a request's sampling needs
    follows from these."""

    request: Request
    assigned_at: float
    decoder: TextDecoder | None = None
    """For a request with stop strings."""
    id: RequestId = field(init=False)
    prompt_len: int = field(init=False)
    final_len: int = field(init=False)
    tokens: list[int] = field(init=False)
    """Prompt and output so far."""
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    logprobs: bytearray | None = None
    """`pack_logprobs` of the output so far, if asked for."""
    counts: TokenCounts | None = None
    """If penalties apply."""
    stop: StopMatcher | None = None
    """If there are stop strings."""

    def __post_init__(self) -> None:
        prompt = unpack_tokens(self.request.prompt)
        self.tokens = prompt + unpack_tokens(self.request.output)
        sampling = self.request.sampling
        self.id, self.prompt_len = self.request.id, len(prompt)
        self.final_len = kv_tokens(self.prompt_len, sampling.max_tokens)
        if sampling.rules and sampling.rules.penalises:
            self.counts = TokenCounts(self.prompt_len)
        if sampling.logprobs is not None:
            self.logprobs = bytearray(self.request.logprobs)
        if sampling.stop:
            if self.decoder is None:
                raise ValueError(f"request {self.id} has stop strings, but there is no tokenizer")
            self.stop = StopMatcher(sampling, self.decoder, prompt)

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is missing; 1 in decode."""
        return len(self.tokens) - self.computed

    @property
    def output_len(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def fresh(self) -> bool:
        """Whether it has made no token yet, in this run."""
        return self.length == self.request.length

    def expect(self, place: int) -> None:
        """One more output token, which is not known yet: of those that its step draws, the one at
        `place`. Until it is known, a negative number stands for it: -1 - place."""
        self.tokens.append(-1 - place)

    def learn(self, token: int, now: float, logprobs: bytes = b"") -> None:
        """The token that was expected, and its record if the request asks for logprobs."""
        self.tokens[-1] = token
        if self.logprobs is not None:
            self.logprobs += logprobs
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def finish_reason(self) -> str | None:
        """Why the request ends with its last token; None: it goes on. Reads the text up to there,
        if there are stop strings."""
        if self._failed:
            return NOT_FINITE
        try:
            if self._stop_token or (self.stop and self.stop.found(self.tokens)):
                return "stop"
        except ForeignError:
            return UNREADABLE
        return "length" if self.output_len >= self.request.sampling.max_tokens else None

    @property
    def text_end(self) -> int | None:
        """Characters of the output's text that belong to the answer, if a stop string ended it."""
        return self.stop.text_end if self.stop else None

    @property
    def _failed(self) -> bool:
        """Whether there was no token to draw; of a last token that is known."""
        return self.tokens[-1] < 0

    @property
    def _stop_token(self) -> bool:
        sampling = self.request.sampling
        if self.tokens[-1] not in sampling.stop_token_ids:
            return False
        return self.output_len > 0 and self.output_len >= sampling.min_tokens

    @property
    def packed(self) -> bytes:
        """`pack_tokens` of prompt and output so far."""
        return pack_tokens(self.tokens)

    @property
    def packed_output(self) -> bytes:
        """`pack_tokens` of the output so far."""
        return pack_tokens(self.tokens[self.prompt_len : self._known])

    @property
    def packed_logprobs(self) -> bytes:
        """The records of the tokens in `packed_output`."""
        if not self.logprobs:
            return b""
        size = record_dtype(self.request.sampling.logprobs or 0).itemsize
        return bytes(self.logprobs[: (self._known - self.prompt_len) * size])

    @property
    def _known(self) -> int:
        """Tokens without a last one that is not there: not yet, or not at all."""
        return self.length - self._failed

    def restore(self, packed: bytes, computed: int, logprobs: bytes = b"") -> None:
        """Go on where another instance left off."""
        self.tokens, self.computed = unpack_tokens(packed), computed
        if self.logprobs is not None:
            self.logprobs[:] = logprobs
