"""Log-probabilities as the two endpoints write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpc_distkv.control.messages.token_logprobs import TokenLogprobs

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

TokenBytes = Callable[[int], bytes]
"""Token id → what it stands for, in UTF-8."""


def chat_logprobs(
    tokens: Sequence[int], scores: Sequence[TokenLogprobs], token_bytes: TokenBytes
) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = token_bytes(token)
        return {
            "token": piece.decode(errors="replace"),
            "logprob": max(logprob, LEAST),
            "bytes": list(piece),
        }

    content = [
        {
            **entry(token, score.logprob),
            "top_logprobs": [entry(other, logprob) for other, logprob in score.top],
        }
        for token, score in zip(tokens, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[int],
    scores: Sequence[TokenLogprobs],
    offsets: Sequence[int],
    token_bytes: TokenBytes,
) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offsets`: where each token begins in the text, in
    characters. The token that was drawn is always among the `top_logprobs`."""

    def name(token: int) -> str:
        """A part of a character is spelled in bytes, so that no two tokens have one name."""
        piece = token_bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    names = [name(token) for token in tokens]
    return {
        "text_offset": list(offsets),
        "token_logprobs": [max(score.logprob, LEAST) for score in scores],
        "tokens": names,
        "top_logprobs": [
            {name(other): max(logprob, LEAST) for other, logprob in score.top}
            | {own: max(score.logprob, LEAST)}
            for own, score in zip(names, scores, strict=True)
        ],
    }
