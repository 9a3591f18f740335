"""Requests that wait for an instance, and where they come from."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter
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


LOOK_AHEAD = 16
"""Requests per instance that are read before they can be assigned: when these are the last ones,
the longest of them go first."""
MOST_AHEAD = 16_384
"""Requests that are read ahead at most, however many instances there are."""
MOST_TOKENS_AHEAD = 1 << 26
"""Tokens, of 4 bytes, of requests that were read and have no instance: then no more are read."""
READ_AT_ONCE = 8
"""Requests read for each that is assigned, until enough are ahead."""

NOT_LARGE = 1 << 62
"""Tokens that no prompt has."""


class RequestQueue:
    """Reads requests a little ahead, and owns them until they are pulled: oldest first, and the
    last ones longest first."""

    def __init__(
        self,
        source: RequestSource,
        instances: int,
        duration: Callable[[Request], float] | None,
    ) -> None:
        """`duration`: how long a request takes; None: the last ones come as all others."""
        self.exhausted = False
        """Whether all requests were read."""
        self.large: list[Request] = []
        """Those that `pull` passed over, oldest first."""
        self._source, self._duration = source, duration
        self._tokens = 0
        """Of all requests that were read and have no instance."""
        self._ahead = deque[Request]()
        self._most_ahead = min(instances * LOOK_AHEAD, MOST_AHEAD)
        self._returned = deque[Request]()
        """Requests that come before all others."""

    def __len__(self) -> int:
        """Requests that were read and wait."""
        return len(self._ahead) + len(self._returned) + len(self.large)

    @property
    def over(self) -> bool:
        """No request is left, nor will come."""
        return self.exhausted and not len(self)

    def give(self, request: Request) -> None:
        """A request that was pulled goes to its instance."""
        self._tokens -= request.length

    def put_back(self, request: Request) -> None:
        """A request that was given waits again."""
        self._tokens += request.length
        self._returned.append(request)

    def pull(self, large_from: int) -> Request | None:
        """The next request of fewer than `large_from` tokens; longer ones wait in `large`."""
        while (request := self._next()) is not None and request.length >= large_from:
            bisect.insort(self.large, request, key=attrgetter("id"))
        return request

    def take_large(self, number: int) -> Request:
        """Request `number` out of `large`."""
        place = next(i for i, request in enumerate(self.large) if request.id == number)
        return self.large.pop(place)

    def _next(self) -> Request | None:
        if not self.exhausted and len(self.large) < self._most_ahead:
            self._read_ahead()
        if self._returned:
            return self._returned.popleft()
        return self._ahead.popleft() if self._ahead else None

    def _read_ahead(self) -> None:
        """Read on. When the last requests are in sight, the longest come first: one that began last
        would be waited for at the end."""
        for _ in range(READ_AT_ONCE):
            if self._enough:
                return
            if (request := self._source.take()) is None:
                self.exhausted = self._source.ended
                if self.exhausted and self._duration:
                    self._ahead = deque(sorted(self._ahead, key=self._duration, reverse=True))
                return
            self._tokens += request.length
            self._ahead.append(request)

    @property
    def _enough(self) -> bool:
        return len(self._ahead) >= self._most_ahead or self._tokens >= MOST_TOKENS_AHEAD
