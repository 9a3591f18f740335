"""What a row asks for, in eight bytes: to see whether it was edited since it was answered."""

from __future__ import annotations

import hashlib
import math

import msgspec


def _number(literal: str) -> int | float:
    """1.0 and 1e2 are 1 and 100: some programs write them so."""
    value = float(literal)
    if math.isinf(value):
        raise ValueError("no such number")
    return int(value) if value.is_integer() and abs(value) < _LEAST_INEXACT else value


_DECODER = msgspec.json.Decoder(float_hook=_number)
_LEAST_INEXACT = 2.0**63
"""Whole numbers from here on stay as they are: not all of them can be encoded."""


def request_digest(request: bytes | memoryview, url: str = "") -> str:
    """Digest of the JSON of a request. The order of its keys, whitespace, escapes and how a number
    is spelled do not matter: a batch file may be written anew by another program. What is no JSON
    is taken as it stands.

    Takes 3 µs a kilobyte, three times as long as the bytes alone would.
    """
    try:
        plain = msgspec.json.encode(_DECODER.decode(request), order="sorted")
    except (ValueError, TypeError, OverflowError, RecursionError):
        plain = bytes(request).strip()
    return hashlib.blake2b(plain, digest_size=8, key=url.encode()).hexdigest()
