"""Which instance answers which request."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpc_distkv.control.assign.queue import LOOK_AHEAD, NOT_LARGE, RequestQueue, RequestSource
from hpc_distkv.control.messages.reports import Large, ReportError, Reports
from hpc_distkv.control.messages.requests import MeanOutput, Request, Result, work
from hpc_distkv.control.policy import ControlConfig

DEALT_AHEAD = 10_000
"""Requests dealt to one instance ahead of its room at most; then the others wait for it."""

Column = np.ndarray[Any, Any]
"""One number per instance."""


class Assignment:
    """Gives waiting requests to instances, oldest first; owner of every unfinished request's
    whereabouts. Pulls requests only as fast as instances have room for them.

    By the policy `queue` a request goes to the instance with least predicted work, or to one that
    has computed a prefix of it. Otherwise requests are dealt out in turn, as to replicas that each
    got their part of the input.
    """

    def __init__(self, source: RequestSource, instances: int, config: ControlConfig) -> None:
        queue = config.policy.queue
        self.queue = RequestQueue(source, instances, self._duration if queue else None)
        self.home: dict[int, int] = {}
        """Unfinished request → its home instance."""
        self._limits: dict[int, int] = {}
        """Unfinished request → output tokens that it may make."""
        self._given_work, self._given_limits = 0.0, 0
        """Of all requests given so far and not taken back: work of their prompts, and output
        limits."""
        self._block_size, self._attention_tokens = config.block_size, config.attention_tokens
        self._outputs = MeanOutput()
        self._prefixes: dict[int, tuple[list[int], int]] = {}
        """One of the large requests → what `Affinity.find` says, until one is given."""
        self._step_tokens, self._large_from = 1.0, NOT_LARGE
        """As of the last `assign`."""
        self._levelled: set[int] = set()
        """Requests that were given back once: they go to who has least to do, wherever their
        prefixes are."""
        self._dealt = None if queue else [deque[Request]() for _ in range(instances)]
        self._next = 0
        """Who is dealt the next request."""
        self._affinity = Affinity(config.block_size) if config.prefix_caching and queue else None

    @property
    def prompt_work(self) -> float:
        """Work of prompts for each output token, of all requests assigned so far."""
        outputs = self._outputs.expected(self._given_limits)
        return self._given_work / outputs if outputs else 0.0

    @property
    def done(self) -> bool:
        """Every request was assigned and has its result."""
        return not self.waiting and not self.home

    @property
    def waiting(self) -> bool:
        """Whether there may be requests that no instance has yet."""
        return not self.queue.over or any(self._dealt or ())

    @property
    def unfinished(self) -> int:
        """Requests that were read and have no result."""
        return len(self.home) + len(self.queue) + sum(map(len, self._dealt or ()))

    def check(self, reports: Reports, migrating: bool) -> None:
        """Refuse news of requests that are not there. `migrating`: requests may change their homes.
        Raises ReportError."""
        gone: set[int] = set()
        for instance, changes in reports.changes.items():
            for large in changes.large:
                if self.home.get(large.request) != instance:
                    raise ReportError(
                        f"instance {instance} reports request {large.request}, which is not there"
                    )
            left = [result.id for result in changes.results]
            left += [request.id for request in changes.returned]
            for request in (*changes.adopted, *left):
                home = self.home.get(request)
                if home is None or request in gone:
                    raise ReportError(
                        f"instance {instance} reports request {request}, which nobody has to answer"
                    )
                if home != instance and not migrating:
                    raise ReportError(
                        f"instance {instance} reports request {request}, which is at {home}"
                    )
            gone.update(left)
            if len(set(left)) < len(left):
                raise ReportError(f"instance {instance} reports a request twice")

    def take_back(self, request: Request) -> None:
        """An instance returns a request that it has not begun."""
        del self.home[request.id], self._limits[request.id]
        self._given_work -= self._prompt_work(request)
        self._given_limits -= request.sampling.max_tokens
        self.queue.put_back(request)
        self._levelled.add(request.id)

    def finish(self, result: Result) -> None:
        """A request has its result."""
        del self.home[result.id]
        self._levelled.discard(result.id)
        self._outputs.add(len(result.tokens) // 4, self._limits.pop(result.id))

    def assign(
        self,
        room_requests: Column,
        room_tokens: Column,
        work_left: Column,
        step_tokens: float = 1.0,
        large_from: int = NOT_LARGE,
    ) -> dict[int, list[Request]]:
        """New requests by instance; instances without any are left out. `room_requests`,
        `room_tokens`: requests and prompt tokens that there is room for; `work_left`: work there is
        already; `step_tokens`: prompt tokens that could be computed in the time of a decode step;
        `large_from`: tokens from which on requests are too large for any one pool: they wait for
        `give_large`."""
        self._step_tokens, self._large_from = step_tokens, large_from
        given: dict[int, list[Request]] = {}
        if not self.waiting:
            return given
        ready = np.flatnonzero((room_requests > 0) & (room_tokens > 0))
        if self._dealt is not None:
            self._deal(ready.tolist(), room_requests, room_tokens, given)
            return given
        columns = (work_left[ready], ready, room_requests[ready], room_tokens[ready])
        places = Places(map(Place, *(column.tolist() for column in columns)))
        if self._affinity:
            self._give_large_to_holders(places, given)
        while places and (request := self.queue.pull(self._large_from)) is not None:
            place, known = self._choose(request, places)
            self._give(request, place.instance, given)
            places.take(place, self._work(request, known), request.length - known)
        return given

    def _give_large_to_holders(self, places: Places, given: dict[int, list[Request]]) -> None:
        """Requests that are too large for any pool, but would not be without a prefix, go where
        that is likely to be."""
        for request in self.queue.large[:LOOK_AHEAD]:
            holders, known = self._prefix(request)
            if place := places.least(holders):
                self._give(self.queue.take_large(request.id), place.instance, given)
                places.take(place, self._work(request, known), request.length - known)

    def _prefix(self, request: Request) -> tuple[list[int], int]:
        """The instances that are likely to have so long a prefix of a large request that the rest
        is not too large for a pool, and its tokens; ([], 0) if there are none."""
        if not self._affinity or request.id in self._levelled:
            return [], 0
        if request.id not in self._prefixes:
            self._prefixes[request.id] = self._affinity.find(request)
        holders, known = self._prefixes[request.id]
        return (holders, known) if request.length - known < self._large_from else ([], 0)

    def large(self, count: int, work_left: Column) -> list[Large]:
        """Out of the oldest `count` requests too large for any one pool that have no instance,
        those that need not wait for one with a prefix of theirs: what that saves is less than the
        work there beyond others'. `work_left` as of `assign`."""
        large = []
        for request in self.queue.large[:count]:
            holders, known = self._prefix(request)
            load = min((float(work_left[holder]) for holder in holders), default=math.inf)
            if load - work(0, known, self._attention_tokens) <= work_left.min():
                continue
            output = self._outputs.expected(request.sampling.max_tokens)
            output = max(1.0, output - (request.length - request.prompt_len))
            blocks = math.ceil((request.length + output) / self._block_size)
            prompt = self._prompt_work(request)
            large.append(Large(request.id, False, 0, blocks, prompt, output))
        return large

    def give_large(self, number: int, instance: int) -> Request:
        """Request `number` out of `large` goes to `instance`."""
        request = self.queue.take_large(number)
        self._give(request, instance, {})
        return request

    def _choose(self, request: Request, places: Places) -> tuple[Place, int]:
        """The instance where the request is done first, and the tokens of its prompt that are
        likely to be there: one with a prefix of it, if what that saves is more than the work there
        beyond others'."""
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
        room_requests: Column,
        room_tokens: Column,
        given: dict[int, list[Request]],
    ) -> None:
        """Give each instance that is `ready` what it was dealt."""
        assert self._dealt is not None
        for instance in ready:
            requests, tokens = int(room_requests[instance]), int(room_tokens[instance])
            hand = self._dealt[instance]
            while requests > 0 and tokens > 0 and (hand or self._deal_until(instance)):
                request = hand.popleft()
                self._give(request, instance, given)
                requests, tokens = requests - 1, tokens - request.length

    def _deal_until(self, instance: int) -> bool:
        """Deal requests until `instance` gets one. Returns False if there is none for it."""
        assert self._dealt is not None
        while not self._dealt[instance]:
            if len(self._dealt[self._next]) >= DEALT_AHEAD:
                return False
            request = self.queue.pull(self._large_from)
            if request is None:
                return False
            self._dealt[self._next].append(request)
            self._next = (self._next + 1) % len(self._dealt)
        return True

    def _duration(self, request: Request) -> float:
        """How long a request takes, in prompt tokens."""
        output = self._outputs.expected(request.sampling.max_tokens)
        return self._prompt_work(request) + self._step_tokens * output

    def _prompt_work(self, request: Request) -> float:
        return work(0, request.length, self._attention_tokens)

    def _give(self, request: Request, instance: int, given: dict[int, list[Request]]) -> None:
        self.home[request.id] = instance
        self._limits[request.id] = request.sampling.max_tokens
        self._given_work += self._prompt_work(request)
        self._given_limits += request.sampling.max_tokens
        self.queue.give(request)
        given.setdefault(instance, []).append(request)
        if self._affinity:
            self._affinity.give(request, instance)
            if request.length >= self._large_from:
                self._prefixes.clear()

    def _work(self, request: Request, known: int) -> float:
        output = self._outputs.expected(request.sampling.max_tokens)
        return work(known, request.prompt_len + output, self._attention_tokens)


class Place(NamedTuple):
    """An instance with room."""

    load: float
    """Predicted work of its requests."""
    instance: int
    requests: int
    """That may still be assigned."""
    tokens: int
    """Prompt tokens after which no further request should be."""


class Places:
    """The instances that take requests, until their room is used up."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._open = {place.instance: place for place in places}
        self._heap = list(self._open.values())
        """Also has what a place was before it took requests."""
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
        """One more request goes to `place`: so much work, with so many tokens of its prompt to
        compute."""
        load, instance, requests, room = place
        del self._open[instance]
        if requests > 1 and room > tokens:
            taken = Place(load + work, instance, requests - 1, room - tokens)
            self._open[instance] = taken
            heapq.heappush(self._heap, taken)


STEP = 32
"""Prefixes of a prompt are looked at whose lengths are 1/32 apart: few, however long it is."""
MOST_KEYS = 1 << 17
"""Prefixes that are remembered; those given longest ago are forgotten first."""
MOST_HOLDERS = 8
"""Instances that are remembered for each, the last ones."""


class Affinity:
    """The gManager's guess of which instances have the rBlocks of which prefixes: those that were
    given a request with it last. Whether they still have them only they know."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._holders: OrderedDict[bytes, list[int]] = OrderedDict()
        """Key of a prefix → the instances."""

    def find(self, request: Request) -> tuple[list[int], int]:
        """The instances that have the longest prefix of the request's prompt, and its tokens."""
        lengths = list(self._lengths(request))
        keys = request.prefix_keys(lengths)
        for key, tokens in zip(reversed(keys), reversed(lengths[: len(keys)]), strict=True):
            if key in self._holders:
                return self._holders[key], tokens
        return [], 0

    def give(self, request: Request, instance: int) -> None:
        """The request goes to `instance`."""
        for key in request.prefix_keys(self._lengths(request)):
            holders = self._holders.setdefault(key, [])
            if instance in holders:
                holders.remove(instance)
            holders.append(instance)
            del holders[:-MOST_HOLDERS]
            self._holders.move_to_end(key)
        while len(self._holders) > MOST_KEYS:
            self._holders.popitem(last=False)

    def _lengths(self, request: Request) -> Iterator[int]:
        blocks = 1
        while blocks * self._block_size < request.prompt_len:
            yield blocks * self._block_size
            blocks += 1 + blocks // STEP
