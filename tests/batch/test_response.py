"""Result lines have the shape that OpenAI's own client library reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.batch.answers.choice import Choice, chat_logprobs, completion_logprobs
from hpc_distkv.batch.answers.line import answer_line, error_line, json_line, read_line
from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.envelope import CHAT, COMPLETION, Endpoint
from hpc_distkv.batch.results.answered import read_answered
from hpc_distkv.batch.results.unfinished import Begun
from hpc_distkv.control.messages.requests import TokenLogprobs, pack_logprobs, unpack_logprobs

ONE = (Choice("line\nbreak", "length", None, 2),)


def answered(endpoint: Endpoint, choices: Sequence[Choice] = ONE) -> Any:
    line = answer_line(
        number=4,
        custom_id="a\n",
        endpoint=endpoint,
        model="tiny",
        choices=choices,
        prompt_tokens=3,
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
                    "message": "Line 3 of the input: no",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "model_not_found",
                }
            },
        },
        "error": {"code": "model_not_found", "message": "Line 3 of the input: no"},
    }


def test_an_error_row_with_a_custom_id_says_no_line() -> None:
    line = json.loads(error_line(2, "a", RowError("no")))
    assert line["error"]["message"] == line["response"]["body"]["error"]["message"] == "no"


def test_several_choices_and_their_tokens() -> None:
    body = answered(CHAT, [Choice("a", "stop", None, 3), Choice("b", "length", None, 4)])
    body = body["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "b"]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}


# Of the bytes of "é", each is a token of its own.
SCORES = [
    TokenLogprobs(-0.25, [(97, -0.25), (98, -1.5)]),
    TokenLogprobs(-float("inf"), [(0xC3, -0.5), (0xA9, -2.0)]),
    TokenLogprobs(-3.0, [(97, -0.125), (257, -4.0)]),
]
TOKENS = [97, 0xC3, 0xA9]


def test_logprobs_of_a_chat() -> None:
    found = chat_logprobs(TOKENS, SCORES, ByteTokenizer().token_bytes)
    assert found["refusal"] is None
    first, second, third = found["content"]
    assert first == {
        "token": "a",
        "logprob": -0.25,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    assert (second["logprob"], second["bytes"]) == (-9999.0, [0xC3])
    assert third["top_logprobs"][1]["token"] == "<257>"


def test_logprobs_of_a_completion_name_the_drawn_token_too() -> None:
    found = completion_logprobs(TOKENS, SCORES, [0, 1, 1], ByteTokenizer().token_bytes)
    assert found == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.25, -9999.0, -3.0],
        "top_logprobs": [
            {"a": -0.25, "b": -1.5},
            {"bytes:\\xc3": -9999.0, "bytes:\\xa9": -2.0},
            {"a": -0.125, "<257>": -4.0, "bytes:\\xa9": -3.0},
        ],
        "text_offset": [0, 1, 1],
    }


def test_packed_logprobs_are_read_back() -> None:
    own = np.array([score.logprob for score in SCORES], np.float32)
    ids = np.array([[token for token, _ in score.top] for score in SCORES])
    values = np.array([[value for _, value in score.top] for score in SCORES], np.float32)
    packed = b"".join(pack_logprobs(own, ids, values))
    assert len(packed) == 3 * (4 + 2 * 8)
    assert unpack_logprobs(packed, 2) == SCORES
    bare = b"".join(pack_logprobs(own, ids[:, :0], values[:, :0]))
    assert unpack_logprobs(bare, 0) == [score._replace(top=[]) for score in SCORES]


def test_bodies_are_what_the_openai_package_reads() -> None:
    chat = pytest.importorskip("openai.types.chat")
    types = pytest.importorskip("openai.types")
    name = ByteTokenizer().token_bytes
    read: dict[Endpoint, Any] = {
        CHAT: (chat.ChatCompletion, chat_logprobs(TOKENS, SCORES, name)),
        COMPLETION: (types.Completion, completion_logprobs(TOKENS, SCORES, [0, 1, 1], name)),
    }
    for endpoint, (kind, logprobs) in read.items():
        body = answered(endpoint, [*ONE, Choice("b", "stop", logprobs, 3)])["response"]["body"]
        parsed = kind.model_validate(body, strict=True)
        assert parsed.model_dump(exclude_unset=True) == body


BREAKS = "".join(chr(c) for c in range(0x3000) if len(f"a{chr(c)}b".splitlines()) > 1)


@given(st.text(st.sampled_from(BREAKS + 'a"\\\u00c2\ue000\U0001f9ff'), max_size=9))
def test_a_line_is_one_line_for_every_reader(text: str) -> None:
    assert {"\n", "\x85", "\u2028", "\u2029"} <= set(BREAKS)
    answer = answer_line(
        number=0,
        custom_id=text,
        endpoint=CHAT,
        model=text,
        choices=[Choice(text, "stop", None, 1)],
        prompt_tokens=1,
        created=0,
    )
    error = error_line(0, text, RowError(text, param=text))
    begun = json_line(Begun(text, 0, "digest"))
    for line in (answer, error, begun):
        assert len(line.decode().splitlines()) == 1
        assert json.loads(line)["custom_id"] == text
    assert json.loads(answer)["response"]["body"]["choices"][0]["message"]["content"] == text
    assert json.loads(error)["error"]["message"] == text
    assert read_line(answer).custom_id == text


def test_half_a_surrogate_pair_is_spelled_out() -> None:
    """As a template's own words or the name of a directory may have one."""
    line = json.loads(error_line(0, "a", RowError("no \ud800", param="\udc80")))
    assert line["error"]["message"] == "no \\ud800"
    line = answered(CHAT, [Choice("\udfff", "stop", {"content": ["\ud800"]}, 1)])
    [choice] = line["response"]["body"]["choices"]
    assert choice["message"]["content"] == "\\udfff"
    assert choice["logprobs"] == {"content": ["\\ud800"]}


def test_lines_of_earlier_versions_are_read(tmp_path: Path) -> None:
    written = answer_line(
        number=0,
        custom_id="a\u2028b",
        endpoint=CHAT,
        model="m",
        choices=ONE,
        prompt_tokens=1,
        created=0,
    )
    raw = written.replace(b"\\u2028", "\u2028".encode())
    assert raw != written
    other = written.replace(b"req_0", b"req_1").replace(b'"a', b'"c')
    (tmp_path / "out").write_bytes(raw + b"\n" + other + b"\n")
    answered, sound = read_answered(tmp_path / "out")
    assert (answered.custom_ids, answered.lines) == ({"a\u2028b", "c\u2028b"}, 2)
    assert sound == (tmp_path / "out").stat().st_size
