"""One row: the tokens of its prompt and how to sample from them, checked against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.body import (
    MOST_CHOICES,
    ChatBody,
    CompletionBody,
    decode_chat,
    decode_completion,
    plain_messages,
    single_prompt,
)
from hpc_distkv.batch.input.envelope import CHAT, Endpoint, Envelope
from hpc_distkv.batch.input.sampling import asked_tokens, check_vocabulary, read_sampling
from hpc_distkv.batch.input.service import Limits, Service
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.errors import ForeignError, foreign_code
from hpc_distkv.ids import RequestId
from hpc_distkv.model.errors import ModelError, TooLongError


@dataclass(frozen=True, slots=True)
class Row:
    """One row, ready to be answered."""

    number: int
    """Place of the line in the input file, from 0."""
    custom_id: str
    endpoint: Endpoint
    prompt: list[int]
    sampling: Sampling
    """Of its first answer."""
    open_ended: bool
    """Neither the row nor the defaults say how many tokens to make."""
    choices: int = 1
    """Answers to give."""
    echo: str = ""
    """What comes before each answer's text."""

    def requests(self) -> Iterator[Request]:
        """A request for each answer. They stand together in the global order of age, by the rows'
        numbers; all but the first have seeds that follow from the row's."""
        prompt = pack_tokens(self.prompt)
        for choice in range(self.choices):
            seed = self.sampling.seed
            seed = derive_seed(seed, f"choice {choice}") if choice else seed
            sampling = msgspec.structs.replace(self.sampling, seed=seed)
            yield Request(RequestId(self.number * MOST_CHOICES + choice), prompt, sampling)


def which_choice(request_id: int) -> tuple[int, int]:
    """A request's id → the number of its row, and which of its answers it is."""
    return divmod(request_id, MOST_CHOICES)


def parse_row(envelope: Envelope, service: Service) -> Row:
    """Envelope → row. Raises RowError with everything the user needs to repair the line."""
    if envelope.problem is not None:
        raise envelope.problem
    assert envelope.custom_id is not None
    assert envelope.endpoint is not None
    body: ChatBody | CompletionBody
    echo = ""
    if envelope.endpoint == CHAT:
        body = chat = decode_chat(envelope.body)
        _check_model(body.model, service)
        prompt = _tokens("messages", service.chat, plain_messages(chat.messages), service.limits)
    else:
        body = completion = decode_completion(envelope.body)
        _check_model(body.model, service)
        given = single_prompt(completion.prompt)
        if isinstance(given, str):
            prompt = _tokens("prompt", service.tokenizer.encode, given, service.limits)
        else:
            prompt = given
        echo = _echo(completion, given, service)
    if not prompt:
        raise RowError("The prompt has no tokens.", param="prompt")
    check_vocabulary("prompt", prompt, service)
    seed = _seed(body.seed, envelope.custom_id, service.defaults.seed)
    sampling = read_sampling(body, len(prompt), seed, service)
    return Row(
        number=envelope.number,
        custom_id=envelope.custom_id,
        endpoint=envelope.endpoint,
        prompt=prompt,
        sampling=sampling,
        open_ended=asked_tokens(body) is None and service.defaults.max_tokens is None,
        choices=body.n or 1,
        echo=echo,
    )


def derive_seed(seed: int, name: str) -> int:
    """A seed of its own for what has a name below `seed`, in [0, 2⁶³): the same on every machine
    and in every run. So a row that gives none has one from the job's seed and its custom_id."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _seed(given: int | None, custom_id: str, job_seed: int) -> int:
    return derive_seed(job_seed, custom_id) if given is None else given & (2**63 - 1)


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


def _echo(body: CompletionBody, prompt: str | list[int], service: Service) -> str:
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    check_vocabulary("prompt", prompt, service)
    skip = body.skip_special_tokens is not False
    try:
        with foreign_code():
            return service.tokenizer.detokenizer((), skip).extend(prompt)
    except ForeignError as error:
        raise RowError(
            f"'prompt' could not be turned into text for 'echo': {error}",
            param="prompt",
            code="tokenization_failed",
        ) from error


def _tokens(field: str, encode: Any, given: Any, limits: Limits) -> list[int]:
    try:
        with foreign_code():
            tokens: list[int] = encode(given, most=limits.tokens)
    except TooLongError as error:
        raise RowError(
            f"The prompt is too long: {error}, but {limits}. Shorten it.",
            param=field,
            code="context_length_exceeded",
        ) from error
    except (ModelError, ForeignError) as error:
        raise RowError(
            f"'{field}' could not be turned into tokens: {error}",
            param=field,
            code="tokenization_failed",
        ) from error
    return tokens
