"""How long the gManager takes for a round, by number of instances."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.reports import NO_REQUEST, Answer, Changes, Report, encode_report
from hpc_distkv.control.messages.requests import Request, Result, Sampling, pack_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.ids import InstanceId, RequestId

CAPACITY = 500
FINISHING, SHORT, SPARE = 0.2, 0.02, 0.3
"""Shares of the instances that in a round finish a row and take a new one, ask for rBlocks, and
promise some."""
RANKS_PER_NODE = 8


def round_times(instances: int, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Seconds of `rounds` rounds of a steady synthetic load, and bytes per round. Reports are made
    and encoded outside the clock; decoding and encoding answers is inside, as on rank 0."""
    rng = random.Random(seed)
    prompt = pack_tokens([1] * 500)
    rows = (Request(RequestId(i), prompt, Sampling(max_tokens=200)) for i in itertools.count())
    links = Links([i // RANKS_PER_NODE for i in range(instances)])
    manager = GManager(SyncSource(rows), links, EngineConfig(num_blocks=CAPACITY))
    running: list[list[int]] = [[] for _ in range(instances)]
    lent: list[dict[InstanceId, int]] = [{} for _ in range(instances)]
    times, sent, received = [], 0, 0
    for number in range(rounds):
        reports = [
            encode_report(_report(number, rng, running[i], lent[i])) for i in range(instances)
        ]
        started = time.perf_counter()
        messages, _ = manager.round(reports)
        times.append(time.perf_counter() - started)
        sent += sum(map(len, messages))
        received += sum(map(len, reports))
        _apply(messages, running, lent, rng)
    return {
        "instances": instances,
        "rounds": rounds,
        "median_ms": round(1e3 * statistics.median(times), 3),
        "max_ms": round(1e3 * max(times), 3),
        "loans": sum(map(len, lent)),
        "bytes_reported_per_round": received // rounds,
        "bytes_answered_per_round": sent // rounds,
    }


def _report(
    number: int, rng: random.Random, running: list[int], lent: dict[InstanceId, int]
) -> Report:
    results = []
    if running and rng.random() < FINISHING:
        results.append(Result(running.pop(0), pack_tokens([1] * 200), "length", 1.0, 9.0))
    short, spare = rng.random() < SHORT, rng.random() < SPARE
    promised = 50 if spare and not short else 0
    return Report(
        round=number,
        capacity=CAPACITY,
        free=max(promised, rng.randrange(100)),
        promised=promised,
        wanted=20 if short else 0,
        wanted_for=running[0] if short and running else number,
        room_requests=max(0, 8 - len(running)),
        room_tokens=4096,
        running=len(running),
        seats=256 - len(running),
        youngest=running[-1] if running else NO_REQUEST,
        longest=rng.randrange(200),
        kv_tokens=40_000,
        work_left=rng.random() * 10_000,
        request_blocks=22.0,
        fixed=0.01,
        per_token=1e-4,
        per_kv=1e-8,
        changes=Changes(lent=dict(lent), results=results) if results or lent else Changes(),
    )


def _apply(
    messages: Sequence[bytes],
    running: list[list[int]],
    lent: list[dict[InstanceId, int]],
    rng: random.Random,
) -> None:
    """Rows are taken in, loans begin, and some of them end."""
    for instance, message in enumerate(messages):
        answer = msgspec.msgpack.decode(message, type=Answer)
        running[instance] += [request.id for request in answer.assign]
        for debtor, blocks in answer.lend.items():
            lent[instance][debtor] = lent[instance].get(debtor, 0) + blocks
        lent[instance] = {d: n for d, n in lent[instance].items() if rng.random() < 0.9}
