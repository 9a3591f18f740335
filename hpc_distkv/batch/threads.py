"""What rank 0 does beside its steps: rows are read in one thread, results are written in another,
and put on the disk in a third.

    input ─► Reader ─► requests ─► the loop of the rank ─► results ─► Writer ─► journals, progress
                └──────────► rows begun, error rows, the end ───────────►┘      │
                                                                   Writer (fsync) ◄┘

Values travel in queues and have one owner at a time; the order of the writer's queue is that in
which they were put, so it knows a row before its results. The reader owns the input, the writer the
journals, the rows in flight and all that is shown, and the loop everything else. When both have
stopped, all is the loop's.

Nothing hangs. The loop waits for no thread before the end of the run. A writer waits for nobody but
the disk, and takes what it is given also after a failure. The reader waits for room among the
requests, until it is stopped, and for the writer. If a thread gets on with nothing for too long
(`quiet`), as on a disk that hangs, the loop ends the job. None calls MPI, and no process waits for
them when it leaves.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from hpc_distkv.comm.waiter import StallClock
from hpc_distkv.control.messages.requests import Request

MOST_REQUESTS = 1024
"""Reading stops when this many requests wait for the gManager."""
MOST_TOKENS = 1 << 20
"""It also stops at this many tokens (4 bytes each) of their prompts; one request may go over it."""
MOST_ENTRIES = 1024
"""Rows that the writer has not heard of: then the reader waits for it."""
PAUSE = 0.1
"""Seconds in which a writer gets nothing, before it looks whether something is to be done."""

T = TypeVar("T")


class Aside:
    """A thread beside the loop, of which the loop can tell whether it gets on."""

    def __init__(
        self, name: str, work: Callable[[], None], progress: Callable[[], object] = lambda: None
    ) -> None:
        """`progress`: its value changes as one piece of work gets on."""
        self.began: float | None = None
        """When the present piece of work was begun (`time.monotonic`); None: there is none."""
        self._progress = progress
        self._seen: object = None
        self._clock = StallClock()
        self._thread = threading.Thread(target=work, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def quiet(self) -> float:
        """Seconds for which it has not got on with its work; to be called often, in the loop."""
        seen = self.began, self._progress()
        if self.began is None or seen != self._seen:
            self._seen = seen
            self._clock.restart()
        return self._clock.look()

    def _join(self, meanwhile: Callable[[], object]) -> None:
        while self._thread.is_alive():
            self._thread.join(PAUSE)
            meanwhile()


class Reader(Aside, Generic[T]):
    """A `RequestSource` that is filled by a thread."""

    def __init__(
        self,
        entries: Iterator[tuple[T, Sequence[Request]]],
        report: Callable[[T | BaseException], None],
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        """`entries`: pulled in the thread; of each, `report` gets the first part before the
        requests in the second can be taken. If pulling fails, it gets the error, and the source
        ends. `progress`: as of `Aside`, while an entry is pulled."""
        super().__init__("reader", self._read, progress)
        self._entries, self._report = entries, report
        self._requests: deque[Request] = deque()
        self._tokens = 0
        """Of the requests."""
        self._changed = threading.Condition()
        """Guards the requests and their tokens."""
        self._over = self._stopped = False

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

    def stop(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """End the thread, as soon as it has its next row. `meanwhile`: called now and then; may
        raise what ends the wait."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._join(meanwhile)

    @property
    def _full(self) -> bool:
        return len(self._requests) >= MOST_REQUESTS or self._tokens >= MOST_TOKENS

    def _read(self) -> None:
        try:
            self.began = time.monotonic()
            for entry, requests in self._entries:
                self.began = None
                self._report(entry)
                if self._stopped or not all(map(self._put, requests)):
                    return
                self.began = time.monotonic()
        except BaseException as error:
            self._report(error)
        finally:
            self.began = None
            self._over = True

    def _put(self, request: Request) -> bool:
        """Wait for room, and whether the thread should go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._full)
            self._requests.append(request)
            self._tokens += request.length
            return not self._stopped


class Writer(Aside, Generic[T]):
    """A thread that handles, one by one, what it is given."""

    def __init__(
        self, handle: Callable[[T], None], after_each: Callable[[], None] = lambda: None
    ) -> None:
        """`after_each`: called after each, and every now and then. Neither may raise anything."""
        super().__init__("writer", self._write)
        self._handle, self._after_each = handle, after_each
        self._queue: SimpleQueue[tuple[T, bool] | None] = SimpleQueue()
        """Things, and whether they take room; None: the end."""
        self._room = threading.Semaphore(MOST_ENTRIES)

    def put(self, thing: T) -> None:
        """Hand something over. Never waits: there must be few of it."""
        self._queue.put((thing, False))

    def put_bounded(self, thing: T) -> None:
        """As `put`, but wait while there is too much of that kind."""
        self._room.acquire()
        self._queue.put((thing, True))

    def stop(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until all is handled, and end the thread. `meanwhile`: as of `Reader.stop`."""
        self._queue.put(None)
        self._join(meanwhile)

    def _write(self) -> None:
        while self._go_on():
            self._after_each()
            self.began = None

    def _go_on(self) -> bool:
        """Handle the next thing, if there is one soon. False: it was the last."""
        try:
            given = self._queue.get(timeout=PAUSE)
        except Empty:
            self.began = time.monotonic()
            return True
        if given is None:
            return False
        self.began = time.monotonic()
        thing, took_room = given
        self._handle(thing)
        if took_room:
            self._room.release()
        return True
