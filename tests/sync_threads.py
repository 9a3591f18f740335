"""The threads of `batch.threads`, without threads: each does its work where it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.messages.requests import Request

T = TypeVar("T")


class SyncReader(SyncSource, Generic[T]):
    """Reads when a request is taken."""

    waits = True

    def __init__(
        self,
        entries: Iterator[tuple[T, Sequence[Request]]],
        tell: Callable[[T | BaseException], None],
    ) -> None:
        super().__init__(self._pull(entries, tell))

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def _pull(
        self,
        entries: Iterator[tuple[T, Sequence[Request]]],
        tell: Callable[[T | BaseException], None],
    ) -> Iterator[Request]:
        try:
            for entry, requests in entries:
                tell(entry)
                yield from requests
        except Exception as error:
            tell(error)


class SyncWriter(Generic[T]):
    """Handles what it is given at once."""

    def __init__(self, handle: Callable[[T], None], rest: Callable[[], None]) -> None:
        self._handle, self._rest = handle, rest

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def put(self, thing: T) -> None:
        self._handle(thing)
        self._rest()

    put_in_turn = put
