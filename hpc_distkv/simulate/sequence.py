"""Requests and sequences without tokens: only their lengths decide anything."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import takewhile

from hpc_distkv.control.messages.requests import Request, Sampling, kv_tokens
from hpc_distkv.ids import RequestId
from hpc_distkv.simulate.workload import TraceRow

_PROMPT = struct.Struct("<IIiI")
"""Tokens of prompt and output, the prefix of the prompt, and the tokens of that one."""
_KEY = struct.Struct("<qq")


class SizedRequest(Request, frozen=True, array_like=True):
    """A request whose `prompt` says how long prompt and output are, in place of tokens, and with
    what other prompts begin too. On the wire it is any request."""

    @classmethod
    def of(cls, id: int, row: TraceRow) -> SizedRequest:
        """A request that makes exactly the row's output, whatever its limit."""
        prompt = _PROMPT.pack(row.prompt, row.output, row.prefix, row.prefix_tokens)
        return cls(RequestId(id), prompt, Sampling(row.max_tokens))

    @property
    def prompt_len(self) -> int:
        """Prompt tokens."""
        return int.from_bytes(self.prompt[:4], "little")

    @property
    def makes(self) -> int:
        """Output tokens it will make."""
        return int.from_bytes(self.prompt[4:8], "little")

    def prefix_keys(self, ends: Iterable[int], salt: bytes = b"") -> list[bytes]:
        """As of any request; what is not shared has none."""
        *_, prefix, shared = _PROMPT.unpack(self.prompt)
        return [_KEY.pack(prefix, end) + salt for end in takewhile(shared.__ge__, ends)]


class SizedSequence:
    """A `decide.sequence.Sequence` that counts tokens and has none."""

    __slots__ = (
        "_output",
        "assigned_at",
        "computed",
        "final_len",
        "first_token_at",
        "id",
        "keys",
        "last_token_at",
        "length",
        "output_len",
        "prompt_len",
        "request",
    )
    first_token_at: float | None
    last_token_at: float | None
    text_end = None
    packed_logprobs = b""

    def __init__(self, request: Request, assigned_at: float) -> None:
        """`request`: a `SizedRequest`, or what the wire made of it."""
        sized = SizedRequest(request.id, request.prompt, request.sampling)
        self.request: Request = sized
        self.assigned_at = assigned_at
        self.computed = 0
        self.first_token_at = self.last_token_at = None
        self.id = sized.id
        self.length = self.prompt_len = sized.prompt_len
        self.output_len = 0
        self.keys: list[bytes] = []
        self._output = sized.makes
        self.final_len = kv_tokens(self.length, sized.sampling.max_tokens)

    def __repr__(self) -> str:
        return f"SizedSequence({self.id}: {self.computed} of {self.length} computed)"

    @property
    def remaining(self) -> int:
        """Tokens whose KV is missing."""
        return self.length - self.computed

    @property
    def fresh(self) -> bool:
        """Whether it has made no token yet."""
        return self.output_len == 0

    def expect(self, place: int) -> None:
        """One more output token, whichever."""
        self.length += 1
        self.output_len += 1

    def learn(self, token: int, now: float, logprobs: bytes = b"") -> None:
        """It is there."""
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def finish_reason(self) -> str | None:
        """It ends when it has its output."""
        if self.output_len < self._output:
            return None
        return "stop" if self._output < self.request.sampling.max_tokens else "length"

    @property
    def packed(self) -> bytes:
        """The number of output tokens, for `restore`."""
        return self.output_len.to_bytes(4, "little")

    @property
    def packed_output(self) -> bytes:
        """As many bytes as the output has."""
        return bytes(4 * self.output_len)

    def restore(self, packed: bytes, computed: int, logprobs: bytes = b"") -> None:
        """Go on where another instance left off."""
        self.output_len, self.computed = int.from_bytes(packed, "little"), computed
        self.length += self.output_len
