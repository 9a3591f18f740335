"""The line of a row in the results file, in the format of OpenAI batch output: as it is written,
answer (`answer_line`) or error row (`error_line`), and as a rerun reads it back (`ResultLine`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from hpc_distkv.batch.answers.choice import Choice
from hpc_distkv.batch.errors import DUPLICATE, RowError
from hpc_distkv.batch.input.envelope import CHAT, Endpoint

ID_PREFIX = "batch_req_"
"""Before the row's number in the `id` of its line."""
REVISED = "."
"""Between the number and the revision of a line, which is above 1 if a line of another row has the
number: rows were inserted into the input."""
_LAST = 2**63 - 1
"""No file has so many lines."""
_BREAKS = {
    "\N{NEXT LINE}".encode(): b"\\u0085",
    "\N{LINE SEPARATOR}".encode(): b"\\u2028",
    "\N{PARAGRAPH SEPARATOR}".encode(): b"\\u2029",
}
"""What JSON need not escape, and what some readers break lines at, as `str.splitlines` does."""


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


def json_line(value: Any) -> bytes:
    """A value as one line of JSON in UTF-8, without newline. Half a surrogate pair, which UTF-8
    cannot say, is spelled out."""
    try:
        line = msgspec.json.encode(value)
    except UnicodeEncodeError:
        line = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
    for character, escaped in _BREAKS.items():
        line = line.replace(character, escaped)
    return line


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(each) for each in value]
    return value


class _Error(msgspec.Struct, frozen=True):
    code: str


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Body(msgspec.Struct, frozen=True):
    usage: _Usage = _Usage()
    created: int = 0


class ResultLine(msgspec.Struct, frozen=True):
    """What is read back of a line of the results."""

    id: str
    custom_id: str | None
    error: _Error | None
    response: _Response
    request_digest: str | None = None
    """`request_digest` of its row; None: an earlier version wrote it."""

    @property
    def number(self) -> int:
        """Place of the row in the input, from 0, when it was answered."""
        return self.place[0]

    @property
    def failed(self) -> bool:
        """Whether it is an error row."""
        return self.error is not None

    @property
    def repeated(self) -> bool:
        """Whether another row has the custom_id."""
        return self.error is not None and self.error.code == DUPLICATE

    @property
    def named(self) -> bool:
        """Whether its row is known by its custom_id alone."""
        return self.custom_id is not None and not self.repeated

    @property
    def place(self) -> tuple[int, int]:
        """Number, and revision: 1, or more if another row had that number before."""
        number, dot, revision = self.id.removeprefix(ID_PREFIX).partition(REVISED)
        return int(number), int(revision) if dot else 1


class _Response(msgspec.Struct, frozen=True):
    body: _Body


def read_line(line: bytes) -> ResultLine:
    """One line of the results file. Raises ValueError when it is not one."""
    try:
        row = msgspec.json.decode(line, type=ResultLine)
        if not 0 <= row.number <= _LAST:
            raise ValueError("no place in a file")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return row
