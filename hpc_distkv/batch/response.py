"""Lines of the results file, in the format of OpenAI batch output."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.schema import CHAT, Endpoint

ID_PREFIX = "batch_req_"
"""Before the row's number in the `id` of its line."""


def answer_line(
    *,
    number: int,
    custom_id: str,
    endpoint: Endpoint,
    model: str,
    text: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
    created: int,
) -> bytes:
    """The line of an answered row, without newline. `created` is in seconds since the epoch."""
    choice: dict[str, Any] = {"index": 0}
    if endpoint == CHAT:
        prefix, kind = "chatcmpl", "chat.completion"
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        prefix, kind = "cmpl", "text_completion"
        choice["text"] = text
    choice |= {"logprobs": None, "finish_reason": finish_reason}
    body = {
        "id": f"{prefix}-{number}",
        "object": kind,
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return _line(number, custom_id, 200, body, None)


def error_line(number: int, custom_id: str | None, error: RowError) -> bytes:
    """The line of a row that cannot be answered, without newline."""
    body = {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
    summary = {"code": error.code, "message": error.message}
    return _line(number, custom_id, error.status, body, summary)


def _line(
    number: int,
    custom_id: str | None,
    status: int,
    body: dict[str, Any],
    error: dict[str, str] | None,
) -> bytes:
    response = {"status_code": status, "request_id": f"req_{number}", "body": body}
    return msgspec.json.encode(
        {
            "id": f"{ID_PREFIX}{number}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
    )
