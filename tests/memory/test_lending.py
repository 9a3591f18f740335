"""Lending between several rManagers and a gManager over the `local` transport, explored by a state
machine: no rBlock is lost, leaked, owned twice or served while overwritten, queries are answered
from the right bytes, and the sum lent equals the sum borrowed for every pair, whatever is lent,
called home, copied, handed over or evicted at once. Steps of different instances overlap in any
way; messages travel, and memory is read, as late as MPI might."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lending_nodes import BLOCK, Marks, Node
from local_ranks import leftovers, network_of, open_local
from seeded_schedule import SeededSchedule

from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.reports import Answer, Changes, Report, encode_report
from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.control.policy import Policy
from hpc_distkv.decide.config import EngineConfig

choices = st.integers(0, 2**32).map(random.Random)
"""One number for all the choices of a rule: examples are long, and shrink by whole rules."""


class Lending(RuleBasedStateMachine):
    @initialize(n=st.integers(2, 4), blocks=st.integers(3, 9), dgfm=st.booleans(), rng=choices)
    def start(self, n: int, blocks: int, dgfm: bool, rng: random.Random) -> None:
        self.comms = open_local(n, stall_timeout=5.0, schedule=SeededSchedule(rng.randrange(1000)))
        self.network = network_of(self.comms)
        self.marks: Marks = {}
        policy = Policy(planner=False, dgfm=dgfm)
        self.nodes: list[Node] = []
        for comm in self.comms:
            config = EngineConfig(blocks, BLOCK, policy=policy, lend_cap=rng.choice((None, 2)))
            self.nodes.append(Node(comm, config, self.marks, self.nodes))
            comm.waiter.always(self.happen)
        self.rng = rng
        links = Links([i % 2 for i in range(n)])
        self.gmanager = GManager(SyncSource(()), links, config)
        self.reports: dict[int, bytes] = {}
        self.lent: dict[int, dict[int, int]] = {}
        self.ids = itertools.count()
        self.round = 0

    def happen(self) -> None:
        """Something goes on beside what a rank does itself: a message travels, or a rank attends
        to its debtors."""
        events = [node.mailbox.attend for node in self.nodes] + self.network.events()
        self.rng.choice(events)()

    def idle(self, rng: random.Random) -> list[Node]:
        """Some of the instances that are between two steps."""
        return [node for node in self.nodes if node.plan is None and rng.random() < 0.7]

    @rule(rng=choices)
    def requests_begin_grow_and_end(self, rng: random.Random) -> None:
        for node in self.idle(rng):
            if node.rm.slots.usable > 0 and rng.random() < 0.6:
                node.begin(next(self.ids), rng.randint(1, min(4, node.rm.slots.usable)))
            for request in rng.sample(sorted(node.rm.tables), len(node.rm.tables)):
                if rng.random() < 0.15:
                    node.end(request)
                elif rng.random() < 0.5 and node.rm.slots.usable > 0:
                    node.grow(request, 1)
            if rng.random() < 0.1:
                node.return_credit(rng)

    @rule(rng=choices)
    def boundaries(self, rng: random.Random) -> None:
        """Answers take effect, and the next round is planned when the last report is there."""
        for node in self.idle(rng):
            if node.answer:
                assert node.rm.lender.settle(node.answer.lend) == []
                node.recall, node.answer = dict(node.answer.recall), None
                node.mailbox.open_credits()
                self.reports[node.number] = self.report(node, rng)
        if len(self.reports) < len(self.nodes):
            return
        encoded, _ = self.gmanager.round([self.reports[node.number] for node in self.nodes])
        for node, answer in zip(self.nodes, encoded, strict=True):
            node.answer = msgspec.msgpack.decode(answer, type=Answer)
        self.round += 1
        self.check_ledger()
        self.reports.clear()

    def report(self, node: Node, rng: random.Random) -> bytes:
        """An instance may promise although it wants something itself: so circles of debts come
        about more often."""
        self.lent[node.number] = {d: loan.total for d, loan in node.rm.lender.loans.items()}
        wanted = rng.choice((0, 2, 5))
        report = Report(
            round=self.round,
            capacity=node.rm.slots.num_blocks,
            free=node.rm.slots.free,
            promised=node.rm.lender.promise(rng.choice((0, node.rm.slots.usable))),
            wanted=wanted,
            wanted_for=0 if wanted else NOBODY,
            changes=Changes(lent=self.lent[node.number]),
        )
        return encode_report(report)

    def check_ledger(self) -> None:
        """It has what the creditors reported, and the grants."""
        counted: Counter[tuple[int, int]] = Counter()
        for creditor, node in enumerate(self.nodes):
            for row in (self.lent[creditor], node.answer.lend):
                counted.update({(debtor, creditor): blocks for debtor, blocks in row.items()})
        assert {(d, c): w for d, c, w in self.gmanager.ledger.pairs()} == counted

    @rule(rng=choices)
    def steps_begin(self, rng: random.Random) -> None:
        for node in self.idle(rng):
            node.begin_step(rng)

    @rule(rng=choices)
    def steps_end(self, rng: random.Random) -> None:
        """A step that has begun needs nobody but creditors that attend."""
        self.rng = rng
        for node in self.nodes:
            if node.plan and rng.random() < 0.7:
                node.finish_step()

    @rule(rng=choices)
    def ten_things_happen(self, rng: random.Random) -> None:
        self.rng = rng
        for _ in range(10):
            self.happen()

    @rule(rng=choices)
    def all_is_quiet(self, rng: random.Random) -> None:
        """Every step ends, every message arrives: then both sides of every debt agree."""
        self.rng = rng
        self.settle()
        for one, other in itertools.permutations(self.nodes, 2):
            debt, loan = (
                one.rm.borrower.debts.get(other.number),
                other.rm.lender.loans.get(one.number),
            )
            assert (debt.used if debt else 0) == (loan.used if loan else 0)
            assert (debt.credit + debt.returned if debt else 0) == (loan.credit if loan else 0)
            for request, table in one.rm.tables.items():
                guest = other.rm.lender.guests.get((one.number, request))
                copies = one.rm.borrower.copies.get(request)
                if copies and copies.creditor == other.number and copies.blocks:
                    assert guest.indices == [*range(copies.blocks)]
                else:
                    assert table.remote.get(other.number, []) == (guest.indices if guest else [])

    def settle(self) -> None:
        for node in self.nodes:
            if node.plan:
                node.finish_step()
        quiet = 0
        while quiet < 2:
            for node in self.nodes:
                node.mailbox.attend()
            quiet = 0 if self.network.events() else quiet + 1
            while events := self.network.events():
                self.rng.choice(events)()
        assert all(node.creditor.idle for node in self.nodes)

    @rule(rng=choices, count=st.integers(20, 100))
    def life(self, rng: random.Random, count: int) -> None:
        """Much of it all: loans take many acts of several instances to come about."""
        acts = [self.requests_begin_grow_and_end, *[self.boundaries] * 3]
        acts += [*[self.steps_begin] * 3, *[self.steps_end] * 3, self.ten_things_happen]
        for _ in range(count):
            rng.choice(acts)(rng)
            self.what_is_served_is_right()

    @invariant()
    def what_is_served_is_right(self) -> None:
        for node in getattr(self, "nodes", []):
            node.check()

    def teardown(self) -> None:
        """When all requests end and all credit is returned, nothing is left of any loan."""
        if not hasattr(self, "nodes"):
            return
        self.settle()
        for _ in range(3):
            for node in self.nodes:
                if node.answer:
                    node.rm.lender.settle(node.answer.lend)
                    node.answer = None
                node.mailbox.open_credits()
                for request in list(node.rm.tables):
                    node.end(request)
                node.return_credit()
                node.begin_step(self.rng)
            self.settle()
        for node in self.nodes:
            node.rm.lender.settle({})
            assert not node.rm.lender.loans
            assert not node.rm.borrower.debts
            assert node.rm.slots.usable == node.rm.slots.num_blocks
        assert leftovers(self.comms) == []


TestLending = Lending.TestCase
TestLending.settings = settings(
    max_examples=100,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
