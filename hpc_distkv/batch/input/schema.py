"""The shape of a batch line and of the two request bodies, checked field by field.

A line is decoded in two steps. `read_envelope` looks at the outer object only, so that a row
whose body is wrong still has its custom_id, and the body of a row that is answered already is
read for its digest alone.
The bodies refuse unknown fields, because a silently dropped option gives silently wrong answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input import unsupported
from hpc_distkv.batch.input.digests import request_digest
from hpc_distkv.batch.input.messages import Message

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
COMPLETION: Endpoint = "/v1/completions"

T = TypeVar("T")

MOST_CHOICES = 128
"""Answers that one row may ask for (`n`), as at OpenAI."""
MOST_LOGPROBS = 20
"""Alternatives that one row may ask for beside each token, as at OpenAI and in vLLM."""
MOST_REPETITION = 1000.0
"""Penalties beyond this forbid a token as well, and would overflow in the end."""

SEEDS = (-(2**63), 2**63 - 1)
"""The least and the largest, of rows and of jobs."""

_SEED_RANGE = Meta(ge=SEEDS[0], le=SEEDS[1])
_LINE_FIELDS = ("custom_id", "method", "url", "body")


class GenerationFields(msgspec.Struct, kw_only=True):
    """What both bodies have in common. None: not given."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, _SEED_RANGE] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=MOST_REPETITION)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: str | list[Annotated[str, Meta(min_length=1)]] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class ChatBody(GenerationFields, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None


class CompletionBody(GenerationFields, kw_only=True):
    """Body of /v1/completions. The elements of a list prompt are checked by `single_prompt`."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | bool | None = None
    """False is none."""
    echo: bool | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """The outer object of one line. With a `problem` the row cannot be answered."""

    number: int
    """Place of the line in the input file, from 0; blank lines count."""
    custom_id: str | None = None
    """None: the line has no usable one."""
    endpoint: Endpoint | None = None
    """None: the line has no usable one."""
    body: bytes | memoryview = b""
    """The whole line, without an endpoint; nothing of one that was not read."""
    problem: RowError | None = None

    @property
    def digest(self) -> str:
        """`request_digest` of the body and its endpoint; nothing of a line that was not read.
        Computed when it is asked for, since most rows are only passed over."""
        return request_digest(self.body, self.endpoint or "") if self.body else ""


def read_envelope(line: bytes, number: int) -> Envelope:
    """One line of the input → its envelope. Never raises: what is wrong becomes its `problem`."""
    custom_id: str | None = None
    try:
        fields = _decode(line, dict[str, msgspec.Raw], "the line")
        custom_id = _custom_id(fields)
        for name in fields:
            if name not in _LINE_FIELDS:
                known = ", ".join(_LINE_FIELDS)
                raise RowError(
                    f"Unknown field '{name}' in the line; a batch line has {known}.",
                    code="unknown_parameter",
                    param=name,
                )
        if "method" in fields and _line_string(fields, "method") != "POST":
            raise RowError("'method' must be 'POST'.", param="method")
        endpoint = _endpoint(_line_string(fields, "url"))
        if "body" not in fields:
            raise _missing("body")
        return Envelope(number, custom_id, endpoint, bytes(fields["body"]))
    except RowError as problem:
        return Envelope(number, custom_id, body=line, problem=problem)


def decode_chat(body: bytes | memoryview) -> ChatBody:
    """Body of a chat row. Raises RowError."""
    return _decode_body(body, ChatBody, unsupported.CHAT)


def decode_completion(body: bytes | memoryview) -> CompletionBody:
    """Body of a completion row. Raises RowError."""
    return _decode_body(body, CompletionBody, unsupported.COMPLETION)


def single_prompt(prompt: str | list[Any]) -> str | list[int]:
    """A prompt field → its one text or its one list of token ids. Raises RowError."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise RowError(
                f"'prompt' holds {len(prompt)} prompts; a row has exactly one. Give each a row.",
                param="prompt",
            )
        if isinstance(prompt[0], str):
            return prompt[0]
        prompt = prompt[0]
    if not prompt:
        raise RowError("'prompt' is empty.", param="prompt")
    if set(map(type, prompt)) != {int}:
        raise RowError(
            "'prompt' must be a string, a list of token ids, or a list of exactly one of those.",
            param="prompt",
        )
    return prompt


def _custom_id(fields: Mapping[str, msgspec.Raw]) -> str:
    custom_id = _line_string(fields, "custom_id")
    if not custom_id:
        raise RowError("'custom_id' must not be empty.", param="custom_id")
    return custom_id


def _line_string(fields: Mapping[str, msgspec.Raw], name: str) -> str:
    if name not in fields:
        raise _missing(name)
    text: str = _decode(fields[name], str, f"'{name}'", name)
    return text


def _missing(name: str) -> RowError:
    return RowError(f"The line has no '{name}'.", code="missing_required_parameter", param=name)


def _endpoint(url: str) -> Endpoint:
    if url == CHAT:
        return CHAT
    if url == COMPLETION:
        return COMPLETION
    raise RowError(
        f"'url' must be '{CHAT}' or '{COMPLETION}', not '{url}'.", code="invalid_url", param="url"
    )


def _decode_body(
    body: bytes | memoryview, kind: type[T], known: Mapping[str, tuple[Any, ...]]
) -> T:
    ours = kind.__struct_fields__  # type: ignore[attr-defined]
    for name, raw in _decode(body, dict[str, msgspec.Raw], "'body'", "body").items():
        if name in ours or name in unsupported.IGNORED:
            continue
        if name not in known:
            raise RowError(f"Unknown field '{name}'.", code="unknown_parameter", param=name)
        unsupported.check(known, name, _decode(raw, Any, f"'{name}'", name), name)
    decoded: T = _decode(body, kind, "the body")
    return decoded


def _decode(raw: bytes | memoryview, kind: Any, what: str, param: str | None = None) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), what, param) from None
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RowError(
            f"In {what}: not valid JSON in UTF-8: {reason}.", code="invalid_json", param=param
        ) from None


def _wrong_type(message: str, what: str, param: str | None) -> RowError:
    reason, _, path = message.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    if path and path != "[...]":
        what = f"'{path}'"
        param = path
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", reason):
        param = f"{path}.{missing[1]}" if path else missing[1]
        return RowError(f"'{param}' is required.", code="missing_required_parameter", param=param)
    if part := re.fullmatch(r"Invalid enum value '(.*)'", reason, re.DOTALL):
        return unsupported.refusal(
            f"In '{path}': '{part[1]}' is not supported, only text is.", path
        )
    return RowError(f"In {what}: {reason}.", param=param)
