"""Which instance answers which row."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpc_distkv.control.messages import Request, Result


@dataclass
class Share:
    """What one instance has been given and not finished."""

    rows: int = 0
    tokens: float = 0.0
    """Predicted work: prompt and expected output tokens."""


class Assignment:
    """Gives waiting rows to instances by load, oldest first; owner of every unfinished row's
    whereabouts. Pulls rows only as fast as instances have room for them."""

    def __init__(self, requests: Iterator[Request], instances: int) -> None:
        self.exhausted = False
        self.home: dict[int, int] = {}
        """Unfinished request → its home instance."""
        self._requests = requests
        self._work: dict[int, float] = {}
        self._shares = [Share() for _ in range(instances)]
        self._outputs, self._output_tokens = 0, 0

    @property
    def done(self) -> bool:
        """Every row was assigned and has its result."""
        return self.exhausted and not self.home

    def finish(self, result: Result) -> None:
        """A row has its result."""
        share = self._shares[self.home.pop(result.id)]
        share.rows -= 1
        share.tokens -= self._work.pop(result.id)
        self._outputs += 1
        self._output_tokens += len(result.tokens) // 4

    def assign(self, room_rows: Sequence[int], room_tokens: Sequence[int]) -> list[list[Request]]:
        """New rows for every instance: to the least loaded first, while it has room for rows and
        for prompt tokens."""
        given: list[list[Request]] = [[] for _ in self._shares]
        rows, tokens = list(room_rows), list(room_tokens)
        ready = [
            (share.tokens, instance)
            for instance, share in enumerate(self._shares)
            if rows[instance] > 0 and tokens[instance] > 0
        ]
        heapq.heapify(ready)
        while ready and (request := self._pull()) is not None:
            _, instance = heapq.heappop(ready)
            given[instance].append(request)
            self._enter(request, instance)
            rows[instance] -= 1
            tokens[instance] -= request.prompt_len
            if rows[instance] > 0 and tokens[instance] > 0:
                heapq.heappush(ready, (self._shares[instance].tokens, instance))
        return given

    def _pull(self) -> Request | None:
        request = next(self._requests, None)
        self.exhausted = request is None
        return request

    def _enter(self, request: Request, instance: int) -> None:
        work = request.prompt_len + self._expected_output(request)
        self.home[request.id] = instance
        self._work[request.id] = work
        self._shares[instance].rows += 1
        self._shares[instance].tokens += work

    def _expected_output(self, request: Request) -> float:
        limit = request.sampling.max_tokens
        return min(limit, self._output_tokens / self._outputs) if self._outputs else limit
