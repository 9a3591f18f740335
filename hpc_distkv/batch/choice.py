"""One answer of a row: from a result's tokens to its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpc_distkv.batch.logprobs import chat_logprobs, completion_logprobs
from hpc_distkv.batch.rows import Row
from hpc_distkv.batch.schema import CHAT
from hpc_distkv.batch.service import TokenizerLike
from hpc_distkv.control.logprobs import unpack_logprobs
from hpc_distkv.control.requests import Result, unpack_tokens
from hpc_distkv.model.detokenizer import Decode, Detokenizer, text_after, text_before


class Choice(NamedTuple):
    """What stands in the results file for one answer."""

    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None
    """In the shape of the row's endpoint."""
    tokens: int
    """Of the output."""


def read_choice(result: Result, row: Row, tokenizer: TokenizerLike) -> Choice:
    """The answer that a result holds. Of the row's prompt, its end will do."""
    sampling, tokens = row.sampling, unpack_tokens(result.tokens)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, sampling.skip_special_tokens)

    logprobs = None
    if sampling.stop or sampling.logprobs is not None:
        text, offsets = _text_and_offsets(decode, row.prompt, tokens)
        text = text[: result.text_end]
    else:
        text = text_after(decode, text_before(decode, row.prompt), tokens)
    if sampling.logprobs is not None:
        scores = unpack_logprobs(result.logprobs, sampling.logprobs)
        if row.endpoint == CHAT:
            logprobs = chat_logprobs(tokens, scores, tokenizer.token_bytes)
        else:
            logprobs = completion_logprobs(tokens, scores, offsets, tokenizer.token_bytes)
    return Choice(row.echo + text, result.finish_reason, logprobs, len(tokens))


def _text_and_offsets(
    decode: Decode, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[str, list[int]]:
    """The text as the engine saw it grow, and where each token begins in it."""
    growing = Detokenizer(decode, prompt)
    offsets = []
    for token in tokens:
        offsets.append(len(growing.text))
        growing.push(token)
    return growing.finish(), offsets
