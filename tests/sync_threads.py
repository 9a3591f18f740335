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
        report: Callable[[T | BaseException], None],
        progress: Callable[[], object],
    ) -> None:
        super().__init__(self._pull(entries, report))

    def start(self) -> None:
        pass

    def stop(self, meanwhile: Callable[[], object]) -> None:
        pass

    def quiet(self) -> float:
        return 0.0

    def _pull(
        self,
        entries: Iterator[tuple[T, Sequence[Request]]],
        report: Callable[[T | BaseException], None],
    ) -> Iterator[Request]:
        try:
            for entry, requests in entries:
                report(entry)
                yield from requests
        except Exception as error:
            report(error)


class SyncWriter(Generic[T]):
    """Handles what it is given at once."""

    began = None

    def __init__(
        self, handle: Callable[[T], None], after_each: Callable[[], None] = lambda: None
    ) -> None:
        self._handle, self._after_each = handle, after_each

    def start(self) -> None:
        pass

    def stop(self, meanwhile: Callable[[], object]) -> None:
        pass

    def quiet(self) -> float:
        return 0.0

    def put(self, thing: T) -> None:
        self._handle(thing)
        self._after_each()

    put_bounded = put
