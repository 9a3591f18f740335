"""JSON lines as they are written: one line for every reader."""

from __future__ import annotations

from typing import Any

import msgspec

_BREAKS = {
    "\N{NEXT LINE}".encode(): b"\\u0085",
    "\N{LINE SEPARATOR}".encode(): b"\\u2028",
    "\N{PARAGRAPH SEPARATOR}".encode(): b"\\u2029",
}
"""What JSON need not escape, and what some readers break lines at, as `str.splitlines` does."""


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
