"""Whole clusters in one process: the real engine over the `local` transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hpc_distkv.comm.collective.group import Group
from hpc_distkv.comm.local.schedule import SeededSchedule
from hpc_distkv.comm.local.threads import leftovers, open_local, run_local
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import Request, Result, Unfinished, unpack_tokens
from hpc_distkv.decide.stop import TextDecoder
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.rank import EngineOptions, RankEngine, connected
from hpc_distkv.ranks.worker import Leader
from hpc_distkv.start.capacity import lone_room
from hpc_distkv.start.layout import lay_out
from hpc_distkv.start.loading import unite

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
