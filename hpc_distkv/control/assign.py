"""Which instance answers which row."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from hpc_distkv.control.affinity import Affinity
from hpc_distkv.control.messages import Large, Request, Result
from hpc_distkv.control.places import Place, Places
from hpc_distkv.control.work import MeanOutput, work

DEALT_AHEAD = 10_000
"""Rows dealt to one instance ahead of its room at most; then the others wait for it."""

LOOK_AHEAD = 16
"""Rows per instance that are read before they can be assigned: when these are the last ones, the
longest of them go first."""
MOST_AHEAD = 16_384
"""Rows that are read ahead at most, however many instances there are."""
MOST_TOKENS_AHEAD = 1 << 26
"""Tokens, of 4 bytes, of rows that were read and have no instance: then no more are read."""
READ_AT_ONCE = 8
"""Rows read for each that is assigned, until enough are ahead: so no round takes long."""

NOT_LARGE = 1 << 62
"""Tokens that no prompt has."""

Numbers = np.ndarray[Any, Any]


class Assignment:
    """Gives waiting rows to instances, oldest first; owner of every unfinished row's whereabouts.
    Pulls rows only as fast as instances have room for them."""

    def __init__(
        self,
        requests: Iterator[Request | None],
        instances: int,
        queue: bool = True,
        attention_tokens: float = float("inf"),
        affinity: Affinity | None = None,
    ) -> None:
        """`requests`: None stands for a row that may come later: the next round looks again.
        `queue`: a row goes to the instance with least predicted work; otherwise rows are dealt
        out in turn, as to replicas that each got their part of the input. `affinity`: if instances
        share the beginnings of rows."""
        self.exhausted = False
        self.home: dict[int, int] = {}
        """Unfinished request → its home instance."""
        self._limits: dict[int, int] = {}
        """Unfinished request → output tokens that it may make."""
        self._given_work, self._given_limits = 0.0, 0
        """Of all rows given so far and not taken back: work of their prompts, and output limits."""
        self._requests = requests
        self._paused = False
        """Whether nothing more is read in this round."""
        self._attention_tokens = attention_tokens
        self._outputs = MeanOutput()
        self._tokens_ahead = 0
        """Of all rows that were read and have no instance."""
        self._ahead = deque[Request]()
        """Rows that were read and wait for an instance."""
        self.large_from = NOT_LARGE
        """Tokens from which on rows are too large for any one pool: they wait apart."""
        self._large: list[Request] = []
        """Oldest first."""
        self._beginnings: dict[int, tuple[list[int], int]] = {}
        """One of them → what `Affinity.find` says, until one is given."""
        self._most_ahead = min(instances * LOOK_AHEAD, MOST_AHEAD)
        self._step_tokens = 1.0
        """Prompt tokens in the time of a decode step, as told last."""
        self._returned = deque[Request]()
        """Rows that come before all others."""
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
        return (
            not self.exhausted
            or bool(self._returned or self._ahead or self._large)
            or any(self._dealt or ())
        )

    @property
    def unfinished(self) -> int:
        """Rows that were read and have no result."""
        dealt = sum(map(len, self._dealt or ())) + len(self._large)
        return len(self.home) + len(self._ahead) + len(self._returned) + dealt

    def take_back(self, request: Request) -> None:
        """An instance returns a row that it has not begun."""
        del self.home[request.id], self._limits[request.id]
        self._given_work -= self._prompt_work(request)
        self._given_limits -= request.sampling.max_tokens
        self._tokens_ahead += request.length
        self._returned.append(request)
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
        self._paused = False
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
        while places and (request := self._pull()) is not None:
            place, known = self._choose(request, places)
            self._give(request, place.instance, given)
            places.take(place, self._work(request, known), request.length - known)
        return given

    def _go_on(self, places: Places, given: dict[int, list[Request]]) -> None:
        """Rows too large for any pool, but for a beginning that is likely to be somewhere, go where
        that is."""
        for request in self._large[:LOOK_AHEAD]:
            holders, known = self._beginning(request)
            if place := places.least(holders):
                self._large.remove(request)
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
        return (holders, known) if request.length - known < self.large_from else ([], 0)

    def large_rows(self, count: int, block_size: int, work_left: Numbers) -> list[Large]:
        """Out of the oldest `count` rows too large for any one pool that have no instance, those
        that need not wait for one with a beginning of theirs: what it saves is less than the work
        it has beyond others. `work_left` as of `assign`."""
        rows = []
        for request in self._large[:count]:
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
        request = next(request for request in self._large if request.id == number)
        self._large.remove(request)
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
            request = self._pull()
            if request is None:
                return False
            self._dealt[self._next].append(request)
            self._next = (self._next + 1) % len(self._dealt)
        return True

    def _pull(self) -> Request | None:
        """The next row that may be assigned."""
        while (request := self._next_row()) is not None and request.length >= self.large_from:
            bisect.insort(self._large, request, key=attrgetter("id"))
        return request

    def _next_row(self) -> Request | None:
        if not self.exhausted and len(self._large) < self._most_ahead:
            self._read_ahead()
        if self._returned:
            return self._returned.popleft()
        return self._ahead.popleft() if self._ahead else None

    def _read_ahead(self) -> None:
        """Read on. When the last rows are in sight, those come first that take longest: one that
        began last would be waited for at the end."""
        for _ in range(READ_AT_ONCE):
            if self._paused or self._enough_ahead:
                return
            try:
                request = next(self._requests)
            except StopIteration:
                self.exhausted = True
                if self._dealt is None:
                    self._ahead = deque(sorted(self._ahead, key=self._duration, reverse=True))
                return
            if request is None:
                self._paused = True
            else:
                self._tokens_ahead += request.length
                self._ahead.append(request)

    @property
    def _enough_ahead(self) -> bool:
        return len(self._ahead) >= self._most_ahead or self._tokens_ahead >= MOST_TOKENS_AHEAD

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
        self._tokens_ahead -= request.length
        given.setdefault(instance, []).append(request)
        if self._affinity:
            self._affinity.give(request, instance)
            if request.length >= self.large_from:
                self._beginnings.clear()

    def _work(self, request: Request, known: int) -> float:
        output = self._outputs.expected(request.sampling.max_tokens)
        return work(known, request.prompt_len + output, self._attention_tokens)
