"""Lines of the results file, in the format of OpenAI batch output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_distkv.batch.answers.choice import Choice
from hpc_distkv.batch.answers.lines import json_line
from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.schema import CHAT, Endpoint

ID_PREFIX = "batch_req_"
"""Before the row's number in the `id` of its line."""
REVISED = "."
"""Between the number and the revision, where an earlier line has the number: when rows were put
into the input before others that were answered."""


def answer_line(
    *,
    number: int,
    revision: int = 1,
    custom_id: str,
    digest: str | None = None,
    endpoint: Endpoint,
    model: str,
    choices: Sequence[Choice],
    prompt_tokens: int,
    created: int,
) -> bytes:
    """The line of an answered row, without newline. `digest`: `request_digest` of the row;
    `created` is in seconds since the epoch."""
    chat = endpoint == CHAT
    completion_tokens = sum(choice.tokens for choice in choices)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{_name(number, revision)}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(index, choice, chat) for index, choice in enumerate(choices)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return _line(_name(number, revision), custom_id, digest, 200, body, None)


def _choice(index: int, choice: Choice, chat: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return {
        "index": index,
        **({"message": message} if chat else {"text": choice.text}),
        "logprobs": choice.logprobs,
        "finish_reason": choice.finish_reason,
    }


def error_line(
    number: int,
    custom_id: str | None,
    error: RowError,
    digest: str | None = None,
    revision: int = 1,
) -> bytes:
    """The line of a row that cannot be answered, without newline."""
    message = error.message
    if custom_id is None:
        message = f"Line {number + 1} of the input: {message}"
    body = {
        "error": {
            "message": message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
    summary = {"code": error.code, "message": message}
    return _line(_name(number, revision), custom_id, digest, error.status, body, summary)


def _name(number: int, revision: int) -> str:
    return str(number) if revision == 1 else f"{number}{REVISED}{revision}"


def _line(
    name: str,
    custom_id: str | None,
    digest: str | None,
    status: int,
    body: dict[str, Any],
    error: dict[str, str] | None,
) -> bytes:
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return json_line(
        {
            "id": f"{ID_PREFIX}{name}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
            **({"request_digest": digest} if digest else {}),
        }
    )
