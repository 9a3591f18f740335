"""Lending between several rManagers and a gManager over the `local` transport, explored by a state
machine: no rBlock is lost, leaked, owned twice or served while overwritten, and the sum lent equals
the sum borrowed for every pair, whatever is lent, called home, copied, handed over or evicted at
once. Messages travel, and memory is read, as late as MPI might."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import msgspec
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hpc_distkv.comm.local import leftovers, network_of, open_local
from hpc_distkv.comm.schedule import SeededSchedule
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.links import Links
from hpc_distkv.control.messages import (
    NOBODY,
    Answer,
    Changes,
    Report,
    Request,
    Sampling,
    pack_tokens,
)
from hpc_distkv.control.policy import Policy
from hpc_distkv.control.wire import encode_report
from hpc_distkv.engine.config import EngineConfig
from hpc_distkv.engine.instance import Instance
from hpc_distkv.engine.scheduler import Plan
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.engine.traffic import Traffic
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.pool import BlockPool

BLOCK = 4

choices = st.integers(0, 2**32).map(random.Random)
"""One number for all the choices of a rule: examples are long, and shrink by whole rules."""


class Node:
    """One instance without a model: its bookkeeping, its bytes and its traffic."""

    def __init__(self, comm, config: EngineConfig) -> None:
        self.instance = Instance(comm.world.rank, config)
        self.rm = self.instance.rm
        self.pool = BlockPool(config.num_blocks + config.bounce, 1, 1, BLOCK, 2, torch.float32)
        self.traffic = Traffic(comm, self.pool, self.instance, (1, 2), 1.0)
        self.answer = Answer(round=0)
        self.recall: dict[int, int] = {}

    @property
    def partners(self) -> list[int]:
        return self.answer.partners

    @property
    def sequences(self) -> dict[int, Sequence]:
        return {sequence.id: sequence for sequence in self.instance.scheduler.running}

    def arrived(self) -> bool:
        moves = self.traffic._moves
        return moves is None or moves.done()


class Lending(RuleBasedStateMachine):
    @initialize(n=st.integers(2, 4), blocks=st.integers(3, 8), dgfm=st.booleans(), rng=choices)
    def start(self, n: int, blocks: int, dgfm: bool, rng: random.Random) -> None:
        self.comms = open_local(n, schedule=SeededSchedule(rng.randrange(1000)))
        self.network = network_of(self.comms)
        policy = Policy(planner=False, dgfm=dgfm)
        self.all = [
            Node(comm, EngineConfig(blocks, BLOCK, policy=policy, lend_cap=rng.choice((None, 2))))
            for comm in self.comms
        ]
        links = Links([i % 2 for i in range(n)])
        self.gmanager = GManager(iter(()), links, n, policy, block_size=BLOCK)
        self.answers = [Answer(round=0)] * n
        self.ids = itertools.count()
        self.round = 0
        self.marks = itertools.count(1)
        self.bytes: dict[tuple[int, int], float] = {}
        """(request, logical index) → what every number in the rBlock is set to."""

    # -- what instances do between steps ---------------------------------------------------------

    @rule(rng=choices)
    def begin(self, rng: random.Random) -> None:
        for node in rng.sample(self.all, rng.randint(1, len(self.all))):
            if node.rm.usable > 0:
                request = Request(next(self.ids), pack_tokens([1]), Sampling(max_tokens=9))
                node.rm.open(request.id)
                node.instance.scheduler.adopt(Sequence(request, assigned_at=0.0))
                for _ in range(rng.randint(1, node.rm.usable)):
                    self.append(node, request.id)

    @rule(rng=choices)
    def grow(self, rng: random.Random) -> None:
        for node in self.all:
            for _ in range(rng.randint(0, max(0, node.rm.usable))):
                if node.rm.tables:
                    self.append(node, rng.choice(sorted(node.rm.tables)))

    def append(self, node: Node, request: int) -> None:
        node.rm.grow(request, 1)
        self.write_tail(node, request)

    def write_tail(self, node: Node, request: int) -> None:
        table = node.rm.tables[request]
        mark = self.bytes[request, table.indices[-1]] = float(next(self.marks))
        node.pool.rblock(table.slots[-1]).fill_(mark)

    @rule(rng=choices)
    def end(self, rng: random.Random) -> None:
        node = rng.choice(self.all)
        if node.sequences:
            sequence = node.sequences[rng.choice(sorted(node.sequences))]
            node.instance.scheduler.finish(sequence)

    @rule(rng=choices)
    def give_credit_back(self, rng: random.Random) -> None:
        node = rng.choice(self.all)
        for creditor, debt in list(node.rm.debts.items()):
            node.rm.return_credit(creditor, rng.randint(0, debt.credit))

    # -- rounds ----------------------------------------------------------------------------------

    @rule(rng=choices)
    def round_and_steps(self, rng: random.Random) -> None:
        """A boundary, then some joint steps of every component."""
        self.boundary(rng)
        for component in self.components():
            for _ in range(rng.randint(0, 3)):
                self.joint_step(component, rng)

    def boundary(self, rng: random.Random) -> None:
        """The answers of the last round take effect, the next round is planned."""
        for node, answer in zip(self.all, self.answers, strict=True):
            assert node.rm.settle(answer.lend) == []
            node.answer, node.recall = answer, dict(answer.recall)
            assert {*node.rm.debts, *node.rm.loans} <= {*node.partners}
        encoded, _ = self.gmanager.round([self.report(node, rng) for node in self.all])
        self.answers = [msgspec.msgpack.decode(answer, type=Answer) for answer in encoded]
        self.round += 1
        counted = {
            (debtor, creditor): loan.total
            for creditor, node in enumerate(self.all)
            for debtor, loan in node.rm.loans.items()
        }
        for creditor, answer in enumerate(self.answers):
            for debtor, blocks in answer.lend.items():
                counted[debtor, creditor] = counted.get((debtor, creditor), 0) + blocks
        assert {(d, c): w for d, c, w in self.gmanager.ledger.pairs()} == counted

    def report(self, node: Node, rng: random.Random) -> bytes:
        """An instance may promise although it wants something itself: so circles of debts come
        about more often."""
        wanted = rng.choice((0, 2, 5))
        report = Report(
            round=self.round,
            capacity=node.rm.num_blocks,
            free=node.rm.free,
            promised=node.rm.promise(rng.choice((0, node.rm.usable))),
            wanted=wanted,
            wanted_for=0 if wanted else NOBODY,
            changes=Changes(lent={d: loan.total for d, loan in node.rm.loans.items()}),
        )
        return encode_report(report)

    def components(self) -> Iterator[list[int]]:
        seen: set[int] = set()
        for start, node in enumerate(self.all):
            component, todo = {start}, [start]
            while todo:
                new = set(self.all[todo.pop()].partners) - component
                component |= new
                todo += new
            if node.partners and start not in seen:
                seen |= component
                yield sorted(component)

    # -- joint steps -----------------------------------------------------------------------------

    def joint_step(self, component: list[int], rng: random.Random) -> None:
        members = [self.all[i] for i in component]
        leaving: set[int] = set()
        for node in members:
            plan = self.plan(node, rng)
            leaving |= {sequence.id for sequence in plan.leaving}
            node.instance._leaving = plan.leaving
            node.traffic.announce(plan, node.partners, 0)
        while self.happens():
            pass
        for node in members:
            node.traffic.accept()
        self.look()
        for node in members:  # rows go on while rBlocks travel
            for request in node.rm.tables.keys() - leaving:
                self.write_tail(node, request)
        self.look()
        moving = list(members)
        while moving:
            for node in [node for node in moving if node.arrived()]:
                node.traffic.finish()
                node.rm.check()
                moving.remove(node)
            assert self.happens() or not moving
        while self.happens():
            pass
        self.look()
        for a, b in itertools.permutations(component, 2):
            self.check_pair(a, b)

    def happens(self) -> bool:
        """Let one event of the network happen."""
        events = self.network.events()
        if events:
            self.network.schedule.random.choice(events)()
        return bool(events)

    def plan(self, node: Node, rng: random.Random) -> Plan:
        moves: list[Move] = []
        leaving: list[Sequence] = []
        for creditor, debt in list(node.rm.debts.items()):
            act = rng.choice(("lend", "lend", "copy", "hand over"))
            if act == "lend":
                moves += self.lend(node, creditor, rng.choice((debt.credit, 1, 0)), rng)
            elif able := self.migrants(node, creditor, whole=act == "hand over"):
                request = rng.choice(able)
                copied, blocks = self.copied(node, request)
                if act == "hand over":
                    leaving.append(node.sequences[request])
                else:
                    blocks = min(debt.credit + copied, blocks - 1)
                moves += [node.rm.copy_out(request, creditor) for _ in range(copied, blocks)]
        return Plan([], moves, list(self.recalls(node, rng)), leaving)

    def lend(self, node: Node, creditor: int, count: int, rng: random.Random) -> Iterator[Move]:
        rm = node.rm
        for _ in range(count):
            going = {(m.request, m.block) for m in rm.outgoing}
            sealed = [
                (request, index)
                for request, table in rm.tables.items()
                if request not in rm.copies
                for index in table.indices
                if index < table.blocks - 1 and (request, index) not in going
            ]
            if sealed:
                yield rm.move_out(*rng.choice(sealed), creditor)

    def migrants(self, node: Node, creditor: int, whole: bool) -> list[int]:
        """Requests that can be copied to `creditor`, in this step with all that is left of them
        if `whole`."""
        rm = node.rm
        going = {move.request for move in rm.outgoing}
        able = []
        for request, table in rm.tables.items():
            copied, blocks = self.copied(node, request)
            here = request not in rm.copies or rm.copies[request].creditor == creditor
            fits = not whole or blocks - copied <= rm.debts[creditor].credit
            if here and fits and not table.remote and request not in going:
                able.append(request)
        return able

    def copied(self, node: Node, request: int) -> tuple[int, int]:
        copies = node.rm.copies.get(request)
        return copies.blocks if copies else 0, node.rm.tables[request].blocks

    def recalls(self, node: Node, rng: random.Random) -> Iterator[Move]:
        """What DGFM planned, or anything."""
        rm = node.rm
        for creditor in list(rm.debts):
            hosted = [
                (request, index)
                for request, table in rm.tables.items()
                for index in table.remote.get(creditor, ())
            ]
            planned = node.recall.get(creditor, 0)
            count = rng.choice((planned, planned, 1, len(hosted)))
            for _ in range(min(count, len(hosted))):
                if rm.usable + rm.bounce > 0:
                    hosted.remove(chosen := rng.choice(hosted))
                    yield rm.bring_home(*chosen, creditor)
            node.recall[creditor] = max(0, planned - count)

    def check_pair(self, debtor: int, creditor: int) -> None:
        debt = self.all[debtor].rm.debts.get(creditor)
        loan = self.all[creditor].rm.loans.get(debtor)
        assert (loan.used if loan else 0) == (debt.used if debt else 0)
        owed = debt.credit + debt.returned if debt else 0
        assert (loan.credit if loan else 0) == owed

    # -- what must hold at every instant ---------------------------------------------------------

    @invariant()
    def look(self) -> None:
        """Bookkeeping is sound, and every logical rBlock is served by exactly one owner, with its
        own bytes."""
        for number, node in enumerate(getattr(self, "all", [])):
            node.instance.check()
            for request, table in node.rm.tables.items():
                for index, slot in zip(table.indices, table.slots, strict=True):
                    self.holds(node, slot, request, index)
                for creditor, indices in table.remote.items():
                    guest = self.all[creditor].rm.guests[number, request]
                    assert guest.indices == indices
        for node in getattr(self, "all", []):
            for (debtor, request), guest in node.rm.guests.items():
                if request in self.all[debtor].rm.tables:  # else it waits to be evicted
                    for index, slot in zip(guest.indices, guest.slots, strict=True):
                        self.holds(node, slot, request, index)

    def holds(self, node: Node, slot: int, request: int, index: int) -> None:
        assert (node.pool.rblock(slot) == self.bytes[request, index]).all()

    def teardown(self) -> None:
        if hasattr(self, "comms"):
            assert leftovers(self.comms) == []


TestLending = Lending.TestCase
TestLending.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
