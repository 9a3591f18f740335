"""Result lines have the shape that OpenAI's own client library reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.response import answer_line, error_line
from hpc_distkv.batch.schema import CHAT, COMPLETION, Endpoint


def answered(endpoint: Endpoint) -> Any:
    line = answer_line(
        number=4,
        custom_id="a\n",
        endpoint=endpoint,
        model="tiny",
        text="line\nbreak",
        finish_reason="length",
        prompt_tokens=3,
        completion_tokens=2,
        created=1_700_000_000,
    )
    assert b"\n" not in line
    return json.loads(line)


def test_answer_of_a_chat() -> None:
    assert answered(CHAT) == {
        "id": "batch_req_4",
        "custom_id": "a\n",
        "response": {
            "status_code": 200,
            "request_id": "req_4",
            "body": {
                "id": "chatcmpl-4",
                "object": "chat.completion",
                "created": 1_700_000_000,
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "line\nbreak", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "length",
                    }
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            },
        },
        "error": None,
    }


def test_answer_of_a_completion() -> None:
    body = answered(COMPLETION)["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0] == {
        "index": 0,
        "text": "line\nbreak",
        "logprobs": None,
        "finish_reason": "length",
    }


def test_error_row() -> None:
    error = RowError("no", status=404, param="model", code="model_not_found")
    assert json.loads(error_line(2, None, error)) == {
        "id": "batch_req_2",
        "custom_id": None,
        "response": {
            "status_code": 404,
            "request_id": "req_2",
            "body": {
                "error": {
                    "message": "no",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "model_not_found",
                }
            },
        },
        "error": {"code": "model_not_found", "message": "no"},
    }


def test_bodies_are_what_the_openai_package_reads() -> None:
    chat = pytest.importorskip("openai.types.chat")
    types = pytest.importorskip("openai.types")
    read: dict[Endpoint, Any] = {CHAT: chat.ChatCompletion, COMPLETION: types.Completion}
    for endpoint, kind in read.items():
        body = answered(endpoint)["response"]["body"]
        parsed = kind.model_validate(body, strict=True)
        assert parsed.model_dump(exclude_unset=True) == body
