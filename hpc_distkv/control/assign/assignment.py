"""Which instance answers which row."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpc_distkv.control.assign.affinity import Affinity
from hpc_distkv.control.assign.queue import LOOK_AHEAD, RequestQueue
from hpc_distkv.control.assign.source import RequestSource
from hpc_distkv.control.assign.work import MeanOutput, work
from hpc_distkv.control.messages.reports import Large, ReportError, Reports
from hpc_distkv.control.messages.requests import Request, Result

DEALT_AHEAD = 10_000
"""Rows dealt to one instance ahead of its room at most; then the others wait for it."""

Numbers = np.ndarray[Any, Any]


class Assignment:
    """Gives waiting rows to instances, oldest first; owner of every unfinished row's whereabouts.
    Pulls rows only as fast as instances have room for them."""

    def __init__(
        self,
        source: RequestSource,
        instances: int,
        queue: bool = True,
        attention_tokens: float = float("inf"),
        affinity: Affinity | None = None,
    ) -> None:
        """`queue`: a request goes to the instance with least predicted work; otherwise requests are
        dealt out in turn, as to replicas that each got their part of the input. `affinity`: if
        instances share prefixes."""
        self.rows = RequestQueue(source, instances, self._duration if queue else None)
        self.home: dict[int, int] = {}
        """Unfinished request → its home instance."""
        self._limits: dict[int, int] = {}
        """Unfinished request → output tokens that it may make."""
        self._given_work, self._given_limits = 0.0, 0
        """Of all rows given so far and not taken back: work of their prompts, and output limits."""
        self._attention_tokens = attention_tokens
        self._outputs = MeanOutput()
        self._beginnings: dict[int, tuple[list[int], int]] = {}
        """One of the large rows → what `Affinity.find` says, until one is given."""
        self._step_tokens = 1.0
        """Prompt tokens in the time of a decode step, as told last."""
        self._levelled: set[int] = set()
        """Rows that were given back once, wherever their beginnings are: to who has least to do."""
        self._dealt = None if queue else [deque[Request]() for _ in range(instances)]
        self._next = 0
        self._affinity = affinity

    @property
    def prompt_work(self) -> float:
        """Work of prompts for each output token, of all rows assigned so far."""
        outputs = self._outputs.expected(self._given_limits)
        return self._given_work / outputs if outputs else 0.0

    @property
    def done(self) -> bool:
        """Every row was assigned and has its result."""
        return not self.waiting and not self.home

    @property
    def waiting(self) -> bool:
        """Whether there may be rows that no instance has yet."""
        return not self.rows.over or any(self._dealt or ())

    @property
    def unfinished(self) -> int:
        """Rows that were read and have no result."""
        return len(self.home) + len(self.rows) + sum(map(len, self._dealt or ()))

    def check(self, reports: Reports, migrating: bool) -> None:
        """Refuse news of rows that are not there. `migrating`: rows may change their homes. Raises
        ReportError."""
        gone: set[int] = set()
        for instance, changes in reports.changes.items():
            for row in changes.large:
                if self.home.get(row.request) != instance:
                    raise ReportError(
                        f"instance {instance} reports request {row.request}, which is not there"
                    )
            rows = [result.id for result in changes.results]
            rows += [request.id for request in changes.returned]
            for request in (*changes.adopted, *rows):
                home = self.home.get(request)
                if home is None or request in gone:
                    raise ReportError(
                        f"instance {instance} reports request {request}, which nobody has to answer"
                    )
                if home != instance and not migrating:
                    raise ReportError(
                        f"instance {instance} reports request {request}, which is at {home}"
                    )
            gone.update(rows)
            if len(set(rows)) < len(rows):
                raise ReportError(f"instance {instance} reports a request twice")

    def take_back(self, request: Request) -> None:
        """An instance returns a row that it has not begun."""
        del self.home[request.id], self._limits[request.id]
        self._given_work -= self._prompt_work(request)
        self._given_limits -= request.sampling.max_tokens
        self.rows.put_back(request)
        self._levelled.add(request.id)

    def finish(self, result: Result) -> None:
        """A row has its result."""
        del self.home[result.id]
        self._levelled.discard(result.id)
        self._outputs.add(len(result.tokens) // 4, self._limits.pop(result.id))

    def assign(
        self,
        room_rows: Numbers,
        room_tokens: Numbers,
        work_left: Numbers,
        step_tokens: float = 1.0,
    ) -> dict[int, list[Request]]:
        """New rows by instance; instances without any are left out. Numbers have one value per
        instance: rows and prompt tokens there is room for, work it has already. `step_tokens`:
        prompt tokens that could be computed in the time of a decode step."""
        self._step_tokens = step_tokens
        given: dict[int, list[Request]] = {}
        if not self.waiting:
            return given
        ready = np.flatnonzero((room_rows > 0) & (room_tokens > 0))
        if self._dealt is not None:
            self._deal(ready.tolist(), room_rows, room_tokens, given)
            return given
        columns = (work_left, room_rows, room_tokens)
        loads, rows, tokens = (column[ready].tolist() for column in columns)
        places = Places(map(Place, loads, ready.tolist(), rows, tokens))
        if self._affinity:
            self._go_on(places, given)
        while places and (request := self.rows.pull()) is not None:
            place, known = self._choose(request, places)
            self._give(request, place.instance, given)
            places.take(place, self._work(request, known), request.length - known)
        return given

    def _go_on(self, places: Places, given: dict[int, list[Request]]) -> None:
        """Rows too large for any pool, but for a beginning that is likely to be somewhere, go where
        that is."""
        for request in self.rows.large[:LOOK_AHEAD]:
            holders, known = self._beginning(request)
            if place := places.least(holders):
                self.rows.large.remove(request)
                self._give(request, place.instance, given)
                places.take(place, self._work(request, known), request.length - known)

    def _beginning(self, request: Request) -> tuple[list[int], int]:
        """The instances that are likely to have so much of a row too large for any pool that the
        rest is not, and the tokens of that."""
        if not self._affinity or request.id in self._levelled:
            return [], 0
        if request.id not in self._beginnings:
            self._beginnings[request.id] = self._affinity.find(request)
        holders, known = self._beginnings[request.id]
        return (holders, known) if request.length - known < self.rows.large_from else ([], 0)

    def large_rows(self, count: int, block_size: int, work_left: Numbers) -> list[Large]:
        """Out of the oldest `count` rows too large for any one pool that have no instance, those
        that need not wait for one with a beginning of theirs: what it saves is less than the work
        it has beyond others. `work_left` as of `assign`."""
        rows = []
        for request in self.rows.large[:count]:
            holders, known = self._beginning(request)
            load = min((float(work_left[holder]) for holder in holders), default=math.inf)
            if load - work(0, known, self._attention_tokens) <= work_left.min():
                continue
            output = self._outputs.expected(request.sampling.max_tokens)
            output = max(1.0, output - (request.length - request.prompt_len))
            blocks = math.ceil((request.length + output) / block_size)
            prompt = self._prompt_work(request)
            rows.append(Large(request.id, False, 0, blocks, prompt, output))
        return rows

    def give_large(self, number: int, instance: int) -> Request:
        """Request `number` out of `large_rows` goes to `instance`."""
        request = next(request for request in self.rows.large if request.id == number)
        self.rows.large.remove(request)
        self._give(request, instance, {})
        return request

    def _choose(self, request: Request, places: Places) -> tuple[Place, int]:
        """The instance where the row is done first, and the tokens of its prompt that are likely to
        be there: one with a beginning of it, if what that saves is more than the work it has
        beyond others."""
        least = places.least_of_all()
        if self._affinity and request.id not in self._levelled:
            holders, known = self._affinity.find(request)
            holder = places.least(holders)
            if holder and holder.load - work(0, known, self._attention_tokens) <= least.load:
                return holder, known
        return least, 0

    def _deal(
        self,
        ready: Sequence[int],
        room_rows: Numbers,
        room_tokens: Numbers,
        given: dict[int, list[Request]],
    ) -> None:
        assert self._dealt is not None
        for instance in ready:
            rows, tokens = int(room_rows[instance]), int(room_tokens[instance])
            hand = self._dealt[instance]
            while rows > 0 and tokens > 0 and (hand or self._deal_until(instance)):
                request = hand.popleft()
                self._give(request, instance, given)
                rows, tokens = rows - 1, tokens - request.length

    def _deal_until(self, instance: int) -> bool:
        """Deal rows until `instance` gets one."""
        assert self._dealt is not None
        while not self._dealt[instance]:
            if len(self._dealt[self._next]) >= DEALT_AHEAD:
                return False
            request = self.rows.pull()
            if request is None:
                return False
            self._dealt[self._next].append(request)
            self._next = (self._next + 1) % len(self._dealt)
        return True

    def _duration(self, request: Request) -> float:
        """How long a row takes, in prompt tokens."""
        output = self._outputs.expected(request.sampling.max_tokens)
        return self._prompt_work(request) + self._step_tokens * output

    def _prompt_work(self, request: Request) -> float:
        return work(0, request.length, self._attention_tokens)

    def _give(self, request: Request, instance: int, given: dict[int, list[Request]]) -> None:
        self.home[request.id] = instance
        self._limits[request.id] = request.sampling.max_tokens
        self._given_work += self._prompt_work(request)
        self._given_limits += request.sampling.max_tokens
        self.rows.give(request)
        given.setdefault(instance, []).append(request)
        if self._affinity:
            self._affinity.give(request, instance)
            if request.length >= self.rows.large_from:
                self._beginnings.clear()

    def _work(self, request: Request, known: int) -> float:
        output = self._outputs.expected(request.sampling.max_tokens)
        return work(known, request.prompt_len + output, self._attention_tokens)


class Place(NamedTuple):
    """An instance with room."""

    load: float
    """Predicted work of its rows."""
    instance: int
    rows: int
    """That may still be assigned."""
    tokens: int
    """Prompt tokens after which no further row should be."""


class Places:
    """The instances that take rows, until their room is used up."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._open = {place.instance: place for place in places}
        self._heap = list(self._open.values())
        """Also has what a place was before it took rows."""
        heapq.heapify(self._heap)

    def __bool__(self) -> bool:
        return bool(self._open)

    def least(self, instances: Iterable[int]) -> Place | None:
        """The one with least load out of `instances`, if any of them has room."""
        return min((self._open[i] for i in instances if i in self._open), default=None)

    def least_of_all(self) -> Place:
        """The one with least load."""
        while self._open.get(self._heap[0].instance) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def take(self, place: Place, work: float, tokens: int) -> None:
        """One more row goes to `place`: so much work, with so many tokens of its prompt to
        compute."""
        load, instance, rows, room = place
        del self._open[instance]
        if rows > 1 and room > tokens:
            taken = Place(load + work, instance, rows - 1, room - tokens)
            self._open[instance] = taken
            heapq.heappush(self._heap, taken)
