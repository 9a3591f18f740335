"""One row: the tokens of its prompt and how to sample from them, checked against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.schema import (
    CHAT,
    ChatBody,
    Endpoint,
    Envelope,
    GenerationFields,
    Message,
    decode_chat,
    decode_completion,
    single_prompt,
)
from hpc_distkv.batch.service import Service
from hpc_distkv.control.messages import Request, Sampling, pack_tokens

GREEDY_BELOW = 1e-5
"""A temperature below this is taken as 0: dividing logits by it would overflow."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, ready to be answered."""

    number: int
    """Place of the line in the input file, from 0."""
    custom_id: str
    endpoint: Endpoint
    prompt: list[int]
    sampling: Sampling
    open_ended: bool
    """Neither the row nor the defaults say how many tokens to make."""

    def request(self) -> Request:
        """The request for the engine; the row's number is its place in the global order."""
        return Request(self.number, pack_tokens(self.prompt), self.sampling)


def parse_row(envelope: Envelope, service: Service) -> Row:
    """Envelope → row. Raises RowError with everything the user needs to repair the line."""
    if envelope.problem is not None:
        raise envelope.problem
    assert envelope.custom_id is not None
    body: GenerationFields
    if envelope.endpoint == CHAT:
        body = chat = decode_chat(envelope.body)
        _check_model(body.model, service)
        prompt = _tokens("messages", service.chat, _plain_messages(chat.messages))
        asked = _asked(chat)
    else:
        body = completion = decode_completion(envelope.body)
        _check_model(body.model, service)
        given = single_prompt(completion.prompt)
        if isinstance(given, str):
            prompt = _tokens("prompt", service.tokenizer.encode, given)
        else:
            prompt = given
        asked = body.max_tokens
    if not prompt:
        raise RowError("The prompt has no tokens.", param="prompt")
    _check_vocabulary("prompt", prompt, service)
    defaults = service.defaults
    sampling = Sampling(
        max_tokens=_max_tokens(len(prompt), asked, service),
        temperature=_temperature(_or(body.temperature, defaults.temperature)),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=_top_k(_or(body.top_k, defaults.top_k), service.vocab_size),
        seed=_seed(body.seed, envelope.custom_id, defaults.seed),
        stop_token_ids=_stop_ids(body, service),
    )
    open_ended = asked is None and defaults.max_tokens is None
    return Row(envelope.number, envelope.custom_id, envelope.endpoint, prompt, sampling, open_ended)


def derive_seed(job_seed: int, custom_id: str) -> int:
    """Seed of a row that gives none, in [0, 2⁶³): the same on every machine and in every run."""
    digest = hashlib.blake2b(f"{job_seed} {custom_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name not in service.model_names:
        served = "' or '".join(service.model_names)
        raise RowError(
            f"The model '{name}' does not exist here; this job serves '{served}'.",
            status=404,
            type="not_found_error",
            param="model",
            code="model_not_found",
        )


def _plain_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        fields = {"role": message.role, "content": content}
        if message.name is not None:
            fields["name"] = message.name
        plain.append(fields)
    return plain


def _tokens(field: str, encode: Any, given: Any) -> list[int]:
    try:
        tokens: list[int] = encode(given)
    except Exception as error:  # templates come with the model and may raise anything
        raise RowError(
            f"'{field}' could not be turned into tokens: {type(error).__name__}: {error}",
            param=field,
            code="tokenization_failed",
        ) from error
    return tokens


def _check_vocabulary(field: str, ids: list[int], service: Service) -> None:
    size = service.vocab_size
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < size:
            raise RowError(
                f"'{field}' has the token id {wrong}; the vocabulary has the ids 0 to {size - 1}.",
                param=field,
            )


def _asked(chat: ChatBody) -> int | None:
    new, old = chat.max_completion_tokens, chat.max_tokens
    if new is not None and old is not None and new != old:
        raise RowError(
            f"'max_tokens' is {old} and 'max_completion_tokens' is {new}; give one of them.",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _max_tokens(prompt_len: int, asked: int | None, service: Service) -> int:
    limits = service.limits
    left = limits.tokens - prompt_len
    if left < (asked or 1):
        wanted = f"{asked} for the output" if asked else "at least 1 for the output"
        raise RowError(
            f"The row asks for {prompt_len + (asked or 1)} tokens ({prompt_len} in the prompt, "
            f"{wanted}), but {limits}. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if left > 0 else "prompt",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    default = service.defaults.max_tokens
    return left if default is None else min(left, default)


def _temperature(given: float) -> float:
    return given if given >= GREEDY_BELOW else 0.0


def _top_k(given: int, vocab_size: int) -> int:
    return given if 0 < given < vocab_size else 0


def _seed(given: int | None, custom_id: str, job_seed: int) -> int:
    return derive_seed(job_seed, custom_id) if given is None else given & (2**63 - 1)


def _stop_ids(body: GenerationFields, service: Service) -> tuple[int, ...]:
    asked = body.stop_token_ids or []
    if asked:
        _check_vocabulary("stop_token_ids", asked, service)
    eos = () if body.ignore_eos else service.eos_ids
    return tuple(dict.fromkeys((*eos, *asked)))
