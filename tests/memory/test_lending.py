"""Lending between several rManagers and a gManager over the `local` transport, explored by a state
machine: no rBlock is lost, leaked, owned twice or served while overwritten, and the sum lent equals
the sum borrowed for every pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hpc_distkv.comm.local import leftovers, open_local
from hpc_distkv.control.gmanager import GManager
from hpc_distkv.control.messages import NOBODY, Answer, Counters, Report
from hpc_distkv.engine.scheduler import Plan
from hpc_distkv.engine.traffic import Traffic
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4


class Instance:
    """One instance without a model: its bookkeeping, its bytes and its traffic."""

    def __init__(self, comm, num_blocks: int, lend_cap: int) -> None:
        self.rm = RManager(comm.world.rank, num_blocks, lend_cap)
        self.pool = BlockPool(num_blocks, 1, 1, BLOCK, 16, torch.float32)
        self.traffic = Traffic(comm, self.pool, self.rm, Counters(), (1, 16), 1.0)
        self.answer: Answer | None = None
        self.partners: list[int] = []
        self.steps = 0
        self.wanted = 0

    def mark(self, request: int, index: int) -> float:
        """What every number in a logical rBlock is set to, so that a mixed-up one is seen."""
        return float(request * 100 + index)

    def write(self, request: int) -> None:
        table = self.rm.tables[request]
        index = table.indices[-1]
        self.pool.rblock(table.slots[-1]).fill_(self.mark(request, index))


class Lending(RuleBasedStateMachine):
    @initialize(n=st.integers(2, 4), blocks=st.integers(3, 8), data=st.data())
    def start(self, n: int, blocks: int, data: st.DataObject) -> None:
        self.comms = open_local(n)
        caps = [data.draw(st.sampled_from((blocks, 2)), label="lend cap") for _ in range(n)]
        self.all = [Instance(c, blocks, cap) for c, cap in zip(self.comms, caps, strict=True)]
        self.gmanager = GManager(iter(()), [i % 2 for i in range(n)])
        self.ids = itertools.count()
        self.round = 0

    # -- what instances do between steps ---------------------------------------------------------

    @rule(data=st.data(), blocks=st.integers(1, 5))
    def begin(self, data: st.DataObject, blocks: int) -> None:
        instance = data.draw(st.sampled_from(self.all))
        if instance.rm.usable:
            request = next(self.ids)
            instance.rm.open(request)
            for _ in range(min(blocks, instance.rm.usable)):
                instance.rm.grow(request, 1)
                instance.write(request)

    @rule(data=st.data(), blocks=st.integers(1, 3))
    def grow(self, data: st.DataObject, blocks: int) -> None:
        instance = data.draw(st.sampled_from(self.all))
        for _ in range(min(blocks, instance.rm.usable)):
            if instance.rm.tables:
                request = data.draw(st.sampled_from(sorted(instance.rm.tables)))
                instance.rm.grow(request, 1)
                instance.write(request)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(self.all))
        if instance.rm.tables:
            instance.rm.close(data.draw(st.sampled_from(sorted(instance.rm.tables))))

    @rule(data=st.data())
    def give_credit_back(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(self.all))
        for creditor, debt in list(instance.rm.debts.items()):
            instance.rm.return_credit(creditor, data.draw(st.integers(0, debt.credit)))

    # -- rounds and joint steps ------------------------------------------------------------------

    @rule(wanted=st.lists(st.sampled_from((0, 0, 2, 5)), min_size=4, max_size=4))
    def boundary(self, wanted: list[int]) -> None:
        for instance in self.all:
            if instance.answer:
                assert instance.rm.settle(instance.answer.lend) == []
                instance.partners = instance.answer.partners
        reports = [
            Report(
                round=self.round,
                capacity=instance.rm.num_blocks,
                free=instance.rm.free,
                promised=instance.rm.promise(0 if want else instance.rm.usable),
                wanted=want,
                wanted_for=0 if want else NOBODY,
                starved=False,
                room_rows=0,
                room_tokens=0,
                lent={d: loan.total for d, loan in instance.rm.loans.items()},
                held={},
                results=[],
                step_time=0.0,
                chunk_time=0.0,
                counters=Counters(),
            )
            for instance, want in zip(self.all, wanted, strict=False)
        ]
        answers, _ = self.gmanager.round(reports)
        for instance, answer in zip(self.all, answers, strict=True):
            instance.answer = answer
        self.round += 1

    @precondition(lambda self: any(instance.partners for instance in self.all))
    @rule(data=st.data(), steps=st.integers(1, 3))
    def joint_steps(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            self.joint_step(data)

    def joint_step(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from([i for i, x in enumerate(self.all) if x.partners]))
        component, todo = {start}, [start]
        while todo:
            new = set(self.all[todo.pop()].partners) - component
            component |= new
            todo += new
        members = [self.all[i] for i in sorted(component)]
        for instance in members:
            moves = list(self.moves(instance, data))
            instance.traffic.announce(Plan([], moves), instance.partners, 0)
        for instance in members:
            instance.traffic.accept()
        for instance in members:
            instance.traffic.finish()
        for a, b in itertools.permutations(sorted(component), 2):
            self.check_pair(a, b)

    def moves(self, instance: Instance, data: st.DataObject):
        for creditor, debt in list(instance.rm.debts.items()):
            count = data.draw(st.sampled_from((debt.credit, 1, 0)), label="moves")
            for _ in range(min(count, debt.credit)):
                going = {(m.request, m.block) for m in instance.rm.outgoing}
                sealed = [
                    (request, index)
                    for request, table in instance.rm.tables.items()
                    for index in table.indices
                    if index < table.blocks - 1 and (request, index) not in going
                ]
                if sealed:
                    yield instance.rm.move_out(*data.draw(st.sampled_from(sealed)), creditor)

    def check_pair(self, debtor: int, creditor: int) -> None:
        debt = self.all[debtor].rm.debts.get(creditor)
        loan = self.all[creditor].rm.loans.get(debtor)
        # Released guests and returned credit of this very step are told in the next header.
        assert (loan.used if loan else 0) == (debt.used if debt else 0)
        owed = debt.credit + debt.returned if debt else 0
        assert (loan.credit if loan else 0) == owed

    # -- what must hold at every instant ---------------------------------------------------------

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        for instance in getattr(self, "all", []):
            instance.rm.check()

    @invariant()
    def every_logical_rblock_is_served_by_exactly_one_owner_with_its_own_bytes(self) -> None:
        for home, instance in enumerate(getattr(self, "all", [])):
            for request, table in instance.rm.tables.items():
                for index, slot in zip(table.indices, table.slots, strict=True):
                    kv = instance.pool.rblock(slot)
                    assert (kv == instance.mark(request, index)).all()
                for creditor, indices in table.remote.items():
                    guest = self.all[creditor].rm.guests[home, request]
                    assert guest.indices == indices
                    for index, slot in zip(guest.indices, guest.slots, strict=True):
                        kv = self.all[creditor].pool.rblock(slot)
                        assert (kv == instance.mark(request, index)).all()

    def teardown(self) -> None:
        if hasattr(self, "comms"):
            assert leftovers(self.comms) == []


TestLending = Lending.TestCase
TestLending.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_a_grant_beyond_the_promise_is_refused_and_sets_nothing_aside():
    rm = RManager(0, 4)
    rm.promise(2)
    assert rm.settle({1: 2, 2: 1}) == [2]
    assert rm.usable == 2
    assert set(rm.loans) == {1}


def test_what_is_promised_is_not_used_at_home():
    rm = RManager(0, 4)
    assert rm.promise(3) == 3
    assert rm.usable == 1
    rm.settle({})
    assert rm.usable == 4


def test_the_lend_cap_bounds_promises():
    rm = RManager(0, 10, lend_cap=3)
    assert rm.promise(8) == 3
    rm.settle({1: 2})
    assert rm.promise(8) == 1


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda rm: rm.host(1, [(0, 0)]), "without credit"),
        (lambda rm: rm.take_back(1, 1), "set aside 0"),
        (lambda rm: rm.evict(1, [7]), "hosts nothing"),
    ],
)
def test_a_partner_that_breaks_the_protocol_is_refused(act, words):
    with pytest.raises(ProtocolError, match=words):
        act(RManager(0, 4))
