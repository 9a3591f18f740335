"""Whole clusters in one process: the real engine over the `local` transport."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from local_ranks import leftovers, open_local, run_local
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.collective.group import Group
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import (
    Request,
    Result,
    Sampling,
    Unfinished,
    pack_tokens,
    unpack_tokens,
)
from hpc_distkv.decide.stop import TextDecoder
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.family import FAMILIES
from hpc_distkv.model.shard import ModelShard
from hpc_distkv.model.weights import load_decoder, random_decoder
from hpc_distkv.ranks.interrupt import DRAIN, HALT, Interrupt
from hpc_distkv.ranks.rank import EngineOptions, RankEngine, connected
from hpc_distkv.ranks.worker import Leader
from hpc_distkv.start.capacity import lone_room
from hpc_distkv.start.layout import lay_out
from hpc_distkv.start.loading import unite

VOCABULARY = 128
BLOCK = 8
OWN = ("steps", "preemptions", "blocks_lent", "blocks_borrowed", "blocks_returned", "migrations")
"""Counters of what an instance decided."""
MOST_ROUNDS = 5000
"""Control rounds after which a run will never end: ranks that idle make thousands per second."""


class Collect(Leader):
    """A leader that keeps the results."""

    def __init__(self, engine: RankEngine, requests: Sequence[Request]) -> None:
        self.gmanager = engine.gmanager(engine.fitting(requests))
        self.results: list[Result] = []
        self.unfinished: list[Unfinished] = []

    def finish(self, result: Result) -> None:
        self.results.append(result)

    def save(self, unfinished: Unfinished) -> None:
        self.unfinished.append(unfinished)

    def tick(self) -> None:
        assert self.gmanager.round_number < MOST_ROUNDS, "no row ends any more"


class Outcome:
    """What a run on a cluster gave."""

    def __init__(
        self,
        results: Sequence[Result],
        counters: Sequence[Counters],
        unfinished: Sequence[Unfinished] = (),
    ) -> None:
        self.unfinished = list(unfinished)
        self.results = {result.id: result for result in results}
        self.ids = sorted(result.id for result in results)
        self.tokens = {result.id: unpack_tokens(result.tokens) for result in results}
        self.counters = list(counters)


def engine_of(
    comm: Comm, model: Decoder, options: EngineOptions, decoder: TextDecoder | None = None
) -> RankEngine:
    """A rank's engine, in as few rounds as can be. Collective."""
    return connected(lay_out(comm, model, options, lone_room(comm)), decoder)


def run_cluster(
    model: Decoder | Mapping[int, Decoder],
    requests: Sequence[Request],
    ranks: int,
    options: EngineOptions,
    schedule: SeededSchedule | None = None,
    decoder: TextDecoder | None = None,
    tp: int = 1,
    prepare: Callable[[list[Comm]], object] = list,
    interrupts: Mapping[int, Interrupt] | None = None,
) -> Outcome:
    """Answer `requests` on `ranks` threads, with one model for all or one for each (or a shard for
    each, in instances of `tp` ranks); checks that no message and no rBlock is left over. `decoder`:
    for stop strings; `prepare`: called with the ends of all ranks before they begin; `interrupts`:
    of ranks that may end the run early."""
    comms = open_local(ranks, 60.0, tp=tp, schedule=schedule)
    prepare(comms)
    results: list[Result] = []
    unfinished: list[Unfinished] = []

    def work(comm: Comm) -> Counters:
        own = model[comm.world.rank] if isinstance(model, Mapping) else model
        if tp > 1:
            own.lanes = Group(comm)
        unite(comm)
        engine = engine_of(comm, own, options, decoder)
        leader = Collect(engine, requests) if comm.world.rank == 0 else None
        instance = engine.run(leader, interrupt=(interrupts or {}).get(comm.world.rank))
        if leader:
            results.extend(leader.results)
            unfinished.extend(leader.unfinished)
        instance.check()
        return instance.counters

    counters = run_local(comms, work)
    assert leftovers(comms) == []
    return Outcome(results, counters, unfinished)


def tiny_decoder() -> Decoder:
    config = ModelConfig(
        family=next(iter(FAMILIES.values())),
        num_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position=4096,
    )
    return random_decoder(config, "float32")


def options(num_blocks: int, **others) -> EngineOptions:
    sizes = {"max_num_batched_tokens": 64, "max_num_seqs": 16} | others
    return EngineOptions(num_blocks=num_blocks, block_size=BLOCK, threads=1, **sizes)


def request(number: int, prompt: int, max_tokens: int, rng: random.Random) -> Request:
    tokens = [rng.randrange(VOCABULARY) for _ in range(prompt)]
    temperature = rng.choice([0.0, 0.9])
    return Request(number, pack_tokens(tokens), Sampling(max_tokens, temperature, seed=number))


def demand_of(times: float, capacity: int, rng: random.Random) -> list[Request]:
    """Rows of very uneven length that together need `times` the capacity (tokens)."""
    rows: list[Request] = []
    total = 0
    while total < times * capacity:
        longest = rng.choice([40, 40, 40, 200, capacity // 2, capacity - 40])
        prompt, output = rng.randint(1, min(longest, capacity - 40)), rng.randint(1, 40)
        rows.append(request(len(rows), prompt, output, rng))
        total += prompt + output
    return rows


def unconstrained(model: Decoder, rows: list[Request]) -> dict[int, list[int]]:
    return run_cluster(model, rows, 1, options(4000, max_num_batched_tokens=512)).tokens


def shards(path: Path, ranks: int, tp: int) -> dict[int, Decoder]:
    """4 heads, 2 KV heads."""
    config = ModelConfig.from_dir(path)
    return {
        rank: load_decoder(path, config, shard=ModelShard(rank % tp, tp)) for rank in range(ranks)
    }


def run(
    path: Path,
    rows: list[Request],
    ranks: int,
    tp: int,
    schedule: SeededSchedule | None = None,
    **sizes: object,
) -> Outcome:
    outcome = run_cluster(shards(path, ranks, tp), rows, ranks, options(**sizes), schedule, tp=tp)
    for rank, counters in enumerate(outcome.counters):
        assert decisions(counters) == decisions(outcome.counters[rank - rank % tp])
    return outcome


def greedy(rows: list[Request]) -> list[Request]:
    """For runs that are not repeated exactly: sums of other parts round otherwise, and one draw in
    a million falls between."""
    return [Request(r.id, r.prompt, Sampling(r.sampling.max_tokens)) for r in rows]


def decisions(counters: Counters) -> dict[str, int]:
    return {name: getattr(counters, name) for name in OWN}


class Countdown(Interrupt):
    """Asked to stop at its rank's report number `at`; the grace lasts that many reports more."""

    def __init__(self, at: int, grace: int) -> None:
        self.now = 0
        super().__init__(grace, clock=lambda: self.now)
        self._at = at

    def _tick(self) -> None:
        self.now += 1
        if self.now == self._at:
            self.ask(self.grace)

    @property
    def drain(self) -> bool:
        self._tick()
        return super().drain

    @property
    def wish(self) -> bytes:
        self._tick()
        return HALT if self.halt else DRAIN if Interrupt.drain.fget(self) else b""
