"""What rank 0 does beside its steps: rows are read in one thread, and results written in another.

    input ─► Reader ─► requests ─► the loop of the rank ─► results ─► Writer ─► journals, progress
                └──────────► rows begun, error rows, the end ───────────►┘

Values travel in queues and have one owner at a time; the order of the writer's queue is that in
which they were put, so it knows a row before its results. The reader owns the input, the writer the
journals, the rows in flight and all that is shown, and the loop everything else. When both have
stopped, all is the loop's.

Nothing hangs. The loop waits for neither thread before the end of the run. The writer waits for
nobody, and takes what it is given also after a failure. The reader waits for room among the
requests, until it is stopped, and for the writer. Neither calls MPI, and no process waits for them
when it leaves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from hpc_distkv.control.messages.requests import Request

MOST_REQUESTS = 1024
"""Reading stops when this many requests wait for the gManager."""
MOST_TOKENS = 1 << 20
"""It also stops at this many tokens (4 bytes each) of their prompts; one request may go over it."""
MOST_ENTRIES = 1024
"""Rows that the writer has not heard of: then the reader waits for it."""
PAUSE = 0.25
"""Seconds in which the writer gets nothing, before it looks whether something is to be done."""

T = TypeVar("T")


class Reader(Generic[T]):
    """A `RequestSource` that is filled by a thread."""

    def __init__(
        self,
        entries: Iterator[tuple[T, Sequence[Request]]],
        tell: Callable[[T | BaseException], None],
    ) -> None:
        """`entries`: pulled in the thread; of each, `tell` gets the first part before the requests
        in the second can be taken. If pulling fails, it gets the error, and the source ends."""
        self._entries, self._tell = entries, tell
        self._requests: deque[Request] = deque()
        self._tokens = 0
        """Of the requests."""
        self._changed = threading.Condition()
        """Guards the requests and their tokens."""
        self._over = self._stopped = False
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the last request was taken."""
        return self._over and not self._requests

    @property
    def waits(self) -> bool:
        """Whether no request will come before one is taken."""
        return self._over or self._full

    def take(self) -> Request | None:
        """The next request; None if it is not there yet, or if the last one was taken."""
        if not self._requests:
            return None
        with self._changed:
            request = self._requests.popleft()
            self._tokens -= request.length
            if 2 * len(self._requests) <= MOST_REQUESTS and 2 * self._tokens <= MOST_TOKENS:
                self._changed.notify()
        return request

    def stop(self) -> None:
        """End the thread, as soon as it has its next row."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def _full(self) -> bool:
        return len(self._requests) >= MOST_REQUESTS or self._tokens >= MOST_TOKENS

    def _read(self) -> None:
        try:
            for entry, requests in self._entries:
                self._tell(entry)
                if self._stopped or not all(map(self._put, requests)):
                    return
        except BaseException as error:
            self._tell(error)
        finally:
            self._over = True

    def _put(self, request: Request) -> bool:
        """Wait for room, and whether the thread should go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._full)
            self._requests.append(request)
            self._tokens += request.length
            return not self._stopped


class Writer(Generic[T]):
    """A thread that handles, one by one, what it is given."""

    def __init__(self, handle: Callable[[T], None], rest: Callable[[], None]) -> None:
        """`rest`: called after each, and every now and then. Neither may raise anything."""
        self._handle, self._rest = handle, rest
        self._queue: SimpleQueue[tuple[T, bool] | None] = SimpleQueue()
        """Things, and whether they take room; None: the end."""
        self._room = threading.Semaphore(MOST_ENTRIES)
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)

    def start(self) -> None:
        """Begin to take things."""
        self._thread.start()

    def put(self, thing: T) -> None:
        """Hand something over. Never waits: there must be few of it."""
        self._queue.put((thing, False))

    def put_in_turn(self, thing: T) -> None:
        """As `put`, but wait while there is too much of that kind."""
        self._room.acquire()
        self._queue.put((thing, True))

    def stop(self) -> None:
        """Wait until all is handled, and end the thread."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _write(self) -> None:
        while True:
            try:
                given = self._queue.get(timeout=PAUSE)
            except Empty:
                self._rest()
                continue
            if given is None:
                return
            thing, took_room = given
            self._handle(thing)
            if took_room:
                self._room.release()
            self._rest()
