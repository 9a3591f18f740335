"""One answer of a row: the text of a result's tokens, and their log-probabilities as the two
endpoints write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.envelope import CHAT
from hpc_distkv.batch.input.rows import Row
from hpc_distkv.batch.input.service import TokenizerLike
from hpc_distkv.control.messages.requests import (
    NOT_FINITE,
    UNREADABLE,
    Result,
    Sampling,
    TokenLogprobs,
    unpack_logprobs,
    unpack_tokens,
)
from hpc_distkv.errors import ForeignError, foreign_code

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

TokenBytes = Callable[[int], bytes]
"""Token id → what it stands for, in UTF-8."""
_FAULTS = {
    NOT_FINITE: "The model's logits are not finite: its weights have NaN or infinite numbers, or "
    "what is computed from them overflows in this --dtype: float16 has less room than bfloat16 or "
    "float32.",
    UNREADABLE: "The tokenizer failed to turn the answer into text, to look for stop strings.",
}


class Choice(NamedTuple):
    """What stands in the results file for one answer."""

    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None
    """In the shape of the row's endpoint."""
    tokens: int
    """Of the output, with the stop token that ended it."""


def fault_of(result: Result) -> RowError | None:
    """Why a result is no answer, if it is none."""
    fault = _FAULTS.get(result.finish_reason)
    return _server_error(fault, result.finish_reason) if fault else None


def read_choice(result: Result, row: Row, tokenizer: TokenizerLike) -> Choice:
    """The answer that a result holds. Of the row's prompt, its end will do. Raises RowError for a
    tokenizer that fails."""
    try:
        with foreign_code():
            return _read(result, row, tokenizer)
    except ForeignError as error:
        fault = f"The tokens of the answer could not be turned into text: {error}"
        raise _server_error(fault, UNREADABLE) from error


def _server_error(message: str, code: str) -> RowError:
    return RowError(message, code=code, status=500, type="server_error")


def _read(result: Result, row: Row, tokenizer: TokenizerLike) -> Choice:
    sampling, tokens = row.sampling, unpack_tokens(result.tokens)
    growing = tokenizer.detokenizer(row.prompt, sampling.skip_special_tokens)
    shown = tokens[: len(tokens) - _ends_unseen(result, tokens, sampling)]
    if sampling.logprobs is None:
        text, logprobs = growing.extend(shown)[: result.text_end], None
    else:
        begins = []
        for token in shown:
            begins.append(growing.length)
            growing.push(token)
        text = growing.text[: result.text_end]
        begins += [growing.length] * (len(tokens) - len(shown))
        offsets = [min(begin, len(text)) for begin in begins]
        logprobs = _logprobs(result, row, tokens, offsets, tokenizer)
    return Choice(row.echo + text, result.finish_reason, logprobs, len(tokens))


def _logprobs(
    result: Result,
    row: Row,
    tokens: Sequence[int],
    offsets: Sequence[int],
    tokenizer: TokenizerLike,
) -> dict[str, Any]:
    scores = unpack_logprobs(result.logprobs, row.sampling.logprobs or 0)
    if row.endpoint == CHAT:
        return chat_logprobs(tokens, scores, tokenizer.token_bytes)
    return completion_logprobs(tokens, scores, offsets, tokenizer.token_bytes)


def _ends_unseen(result: Result, tokens: Sequence[int], sampling: Sampling) -> bool:
    """Whether the last token is a stop token that is no part of the text. It counts as a token of
    the output all the same, and has its log-probability."""
    if result.finish_reason != "stop" or result.text_end is not None or sampling.include_stop:
        return False
    return bool(tokens) and tokens[-1] in sampling.stop_token_ids


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
