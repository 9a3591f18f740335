"""Rounds with a gManager: reports in, decoded answers out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from made_reports import report

from hpc_distkv.control.assign.assignment import Assignment
from hpc_distkv.control.assign.queue import RequestSource, SyncSource
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.reports import Answer, Changes, Report, encode_report
from hpc_distkv.control.messages.requests import Request, Result, Sampling, pack_tokens
from hpc_distkv.control.policy import POLICIES, Policy
from hpc_distkv.decide.config import EngineConfig

GREEDY = POLICIES["lend-greedy"]
DGFM = Policy(planner=False)


def requests(count: int, prompt: int = 4, max_tokens: int = 4) -> list[Request]:
    sampling = Sampling(max_tokens=max_tokens)
    return [Request(number, pack_tokens(range(prompt)), sampling) for number in range(count)]


def assignment_of(
    source: RequestSource, instances: int, queue: bool = True, **others: Any
) -> Assignment:
    """`queue`: whether all share one; `others`: of the instances' config."""
    policy = POLICIES["queue" if queue else "isolated"]
    return Assignment(source, instances, EngineConfig(num_blocks=10, policy=policy, **others))


class Job:
    """A gManager, and the rounds with it."""

    def __init__(
        self,
        instances: int,
        rows: Iterable[Request] = (),
        policy: Policy = GREEDY,
        nodes: Sequence[int] = (),
        exchange: Sequence[tuple[float, float]] = (),
        **others: Any,
    ) -> None:
        """All on one node but for `nodes`; `others`: of the instances' config."""
        links = Links(nodes or [0] * instances, exchange=exchange)
        config = EngineConfig(num_blocks=10, policy=policy, **others)
        self.manager = GManager(SyncSource(rows), links, config)
        self.results: list[Result] = []

    def round(self, *reports: Report) -> list[Answer]:
        number = self.manager.round_number
        messages = [encode_report(msgspec.structs.replace(r, round=number)) for r in reports]
        answers, self.results = self.manager.round(messages)
        decoded = [msgspec.msgpack.decode(answer, type=Answer) for answer in answers]
        assert all(answer.round == number for answer in decoded)
        return decoded


def lends(row: dict[int, int], **fields: object) -> Report:
    return report(changes=Changes(lent=row), **fields)


def uneven(**others: object) -> tuple[Report, Report]:
    """A long row fills one instance, short rows half of another."""
    model = {
        "fixed": 0.01,
        "per_token": 0.001,
        "per_kv": 1e-5,
        "request_blocks": 2.5,
        "room_requests": 0,
    }
    long = {"free": 0, "running": 1, "seats": 15, "kv_tokens": 3168, "longest": 99}
    short = {"free": 60, "promised": 50, "running": 16, "kv_tokens": 1280} | others
    return report(capacity=100, **model, **long), report(capacity=100, **model, **short)


def starving(wanted: int, wanted_for: int = 0, **fields: object) -> Report:
    return report(wanted=wanted, wanted_for=wanted_for, starved=True, free=0, **fields)
