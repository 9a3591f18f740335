"""What a row asks for, in eight bytes: to see whether it was edited since it was answered."""

from __future__ import annotations

import hashlib

import msgspec


def request_digest(request: bytes | memoryview, url: str = "") -> str:
    """Digest of the JSON of a request. The order of its keys, whitespace and escapes do not matter:
    a batch file may be written anew by another program. What is no JSON is taken as it stands.

    Takes 3 µs a kilobyte, three times as long as the bytes alone would.
    """
    try:
        plain = msgspec.json.encode(msgspec.json.decode(request), order="sorted")
    except (ValueError, TypeError, OverflowError, RecursionError):
        plain = bytes(request).strip()
    return hashlib.blake2b(plain, digest_size=8, key=url.encode()).hexdigest()
