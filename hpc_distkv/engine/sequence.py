"""A request while it is being answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_distkv.control.messages import Request, pack_tokens, unpack_tokens


@dataclass(eq=False)
class Sequence:
    """Tokens of one request and how many of them have their KV in rBlocks."""

    request: Request
    assigned_at: float
    tokens: list[int] = field(init=False)
    """Prompt and output so far."""
    computed: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = unpack_tokens(self.request.prompt)

    @property
    def id(self) -> int:
        """Place in the global order; lower is older."""
        return self.request.id

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is missing; 1 in decode."""
        return self.length - self.computed

    @property
    def output_len(self) -> int:
        """Output tokens so far."""
        return self.length - self.request.prompt_len

    def append(self, token: int, now: float) -> None:
        """One more output token."""
        self.tokens.append(token)
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    @property
    def final_len(self) -> int:
        """Most tokens whose KV this request can come to need: the last output token needs none."""
        return self.request.prompt_len + self.request.sampling.max_tokens - 1

    @property
    def finish_reason(self) -> str | None:
        """Why the request ends with its last token; None: it goes on."""
        sampling = self.request.sampling
        if self.tokens[-1] in sampling.stop_token_ids and self.output_len:
            return "stop"
        return "length" if self.output_len >= sampling.max_tokens else None

    @property
    def packed(self) -> bytes:
        """`pack_tokens` of prompt and output so far."""
        return pack_tokens(self.tokens)

    @property
    def packed_output(self) -> bytes:
        """`pack_tokens` of the output without the stop token."""
        output = self.tokens[self.request.prompt_len :]
        return pack_tokens(output[:-1] if self.finish_reason == "stop" else output)

    def restore(self, packed: bytes, computed: int) -> None:
        """Go on where another instance left off."""
        self.tokens, self.computed = unpack_tokens(packed), computed
