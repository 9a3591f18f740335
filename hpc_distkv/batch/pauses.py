"""What takes long to come, in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def with_pauses(items: Iterator[T | None], seconds: float) -> Iterator[T | None]:
    """`items` but those that are None, and a None whenever `seconds` went by in which they came:
    then whoever takes them may do something else first. The time between is not counted."""
    spent, since = 0.0, time.monotonic()
    for item in items:
        spent += time.monotonic() - since
        if item is not None:
            yield item
        if spent >= seconds:
            spent = 0.0
            yield None
        since = time.monotonic()
