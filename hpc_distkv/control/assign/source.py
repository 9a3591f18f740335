"""Where requests come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hpc_distkv.control.messages.requests import Request


class RequestSource(Protocol):
    """Requests, oldest first, that somebody else may still be reading."""

    @property
    def ended(self) -> bool:
        """Whether the last request was taken."""

    def take(self) -> Request | None:
        """The next request; None if it is not there yet, or if the last one was taken. Never
        waits."""


class SyncSource:
    """A `RequestSource` over an iterable, which is pulled in the caller's time."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self.ended = False

    def take(self) -> Request | None:
        """The next request; None behind the last one."""
        request = next(self._requests, None)
        self.ended = request is None
        return request
