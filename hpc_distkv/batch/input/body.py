"""The two request bodies, checked field by field.

They refuse unknown fields, because a silently dropped option gives silently wrong answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input import unsupported
from hpc_distkv.batch.input.envelope import decode_json

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


class ContentPart(msgspec.Struct):
    """A piece of a message: text, or what an assistant says when it refuses. No other kind is
    supported; other fields (`cache_control`, `annotations`) are passed over."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct):
    """One message of a chat. As in vLLM, fields of others are passed over (`annotations`,
    `reasoning_details`, …), but for those in `unsupported.MESSAGE`."""

    role: Annotated[str, Meta(min_length=1)]
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """As `reasoning_content`."""
    audio: Any = None
    function_call: Any = None
    images: Any = None
    partial: Any = None
    prefix: Any = None
    tool_call_id: Any = None
    tool_calls: Any = None


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

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None


class CompletionBody(GenerationFields, kw_only=True):
    """Body of /v1/completions. The elements of a list prompt are checked by `single_prompt`."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | bool | None = None
    """False is none."""
    echo: bool | None = None


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


def plain_messages(messages: Iterable[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: role, content as text, and what else there is. Raises
    RowError."""
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _plain(message: ChatMessage, path: str) -> dict[str, Any]:
    for name in unsupported.MESSAGE:
        unsupported.check(unsupported.MESSAGE, name, getattr(message, name), f"{path}.{name}")
    assistant = message.role == "assistant"
    plain = {"role": message.role, "content": _text(message, assistant, f"{path}.content")}
    if message.name is not None:
        plain["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if assistant and reasoning:
        plain["reasoning_content"] = plain["reasoning"] = reasoning
    return plain


def _text(message: ChatMessage, assistant: bool, path: str) -> str:
    content = message.content
    if content is None:
        if not assistant:
            raise _required(path)
        return message.refusal or ""
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{path}[{n}]") for n, part in enumerate(content))


def _part_text(part: str | ContentPart, path: str) -> str:
    if isinstance(part, str):
        return part
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise _required(f"{path}.{part.type}")
    return text


def _required(path: str) -> RowError:
    return RowError(f"'{path}' is required.", code="missing_required_parameter", param=path)


def _decode_body(
    body: bytes | memoryview, kind: type[T], known: Mapping[str, tuple[Any, ...]]
) -> T:
    ours = kind.__struct_fields__  # type: ignore[attr-defined]
    for name, raw in decode_json(body, dict[str, msgspec.Raw], "'body'", "body").items():
        if name in ours or name in unsupported.IGNORED:
            continue
        if name not in known:
            raise RowError(f"Unknown field '{name}'.", code="unknown_parameter", param=name)
        unsupported.check(known, name, decode_json(raw, Any, f"'{name}'", name), name)
    decoded: T = decode_json(body, kind, "the body")
    return decoded
