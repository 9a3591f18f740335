"""The messages of a chat, also as clients send back those that they were answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input import unsupported


class Part(msgspec.Struct):
    """A piece of a message: text, or what an assistant says when it refuses. No other kind is
    supported; other fields (`cache_control`, `annotations`) are passed over."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct):
    """One message of a chat. As in vLLM, fields of others are passed over (`annotations`,
    `reasoning_details`, …), but for those in `unsupported.MESSAGE`."""

    role: Annotated[str, Meta(min_length=1)]
    content: str | list[str | Part] | None = None
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


def plain_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: role, content as text, and what else there is. Raises
    RowError."""
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _plain(message: Message, path: str) -> dict[str, Any]:
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


def _text(message: Message, assistant: bool, path: str) -> str:
    content = message.content
    if content is None:
        if not assistant:
            raise _missing(path)
        return message.refusal or ""
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{path}[{n}]") for n, part in enumerate(content))


def _part_text(part: str | Part, path: str) -> str:
    if isinstance(part, str):
        return part
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise _missing(f"{path}.{part.type}")
    return text


def _missing(path: str) -> RowError:
    return RowError(f"'{path}' is required.", code="missing_required_parameter", param=path)
