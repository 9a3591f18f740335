"""Live migration: rows are copied while they decode and go on elsewhere with the same tokens."""

from __future__ import annotations

import pytest
from clusters import options, run_cluster, unconstrained
from seeded_schedule import SeededSchedule
from workloads import migrating_rows, migrations

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.migration import COPIED_BLOCKS, GROWTH_BLOCKS, Migrations
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.loan import MoveKind
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4


class Rig:
    """One instance whose rows all decode, and credit with others."""

    def __init__(self, blocks: dict[int, int], num_blocks: int = 60) -> None:
        """`blocks`: request → its rBlocks; the last has one token."""
        self.rm = RManager(0, num_blocks)
        config = EngineConfig(num_blocks, BLOCK, policy=POLICIES["migrate"])
        self.migrations = Migrations()
        self.scheduler = Scheduler(self.rm, config, Counters())
        for number, count in blocks.items():
            self.scheduler.adopt(self._sequence(number, count))
        self.running = self.scheduler.running

    def _sequence(self, number: int, blocks: int) -> TokenSequence:
        length = (blocks - 1) * BLOCK + 1
        request = Request(number, pack_tokens(range(length)), Sampling(max_tokens=99))
        sequence = TokenSequence(request, assigned_at=0.0)
        sequence.computed = length - 1
        self.rm.open(number)
        self.rm.grow(number, blocks)
        return sequence

    def step(self, short: int = 1) -> tuple[list[tuple[int, int, int]], list[int]]:
        """(request, rBlock, creditor) of the copies of one step, and who leaves with it."""
        moves, leaving = self.migrations.plan(self.scheduler, short)
        assert all(move.kind is MoveKind.COPY for move in moves)
        self.rm.borrower.commit(moves, [])
        for sequence in leaving:
            self.scheduler.hand_over(sequence)
        self.rm.check()
        return [(m.key, m.block, m.peer) for m in moves], [s.id for s in leaving]


def chosen(blocks: dict[int, int], credit: int, short: int) -> set[int]:
    rig = Rig(blocks)
    rig.rm.borrower.credit_opened(3, credit)
    copies, _ = rig.step(short)
    return {request for request, *_ in copies}


# -- who leaves ---------------------------------------------------------------------------------


def test_the_smallest_row_that_frees_enough_leaves():
    rows = {0: 9, 1: 3, 2: 5, 3: 6}
    assert chosen(rows, credit=40, short=4) == {2}
    assert chosen(rows, credit=40, short=3) == {1}
    assert chosen(rows, credit=40, short=6) == {3}


def test_if_none_frees_enough_the_largest_that_finds_room_leaves():
    rows = {0: 9, 1: 3, 2: 5, 3: 6}
    assert chosen(rows, credit=40, short=10) == {0}
    assert chosen(rows, credit=6 + GROWTH_BLOCKS, short=10) == {3}
    assert chosen(rows, credit=3 + GROWTH_BLOCKS, short=10) == {1}
    assert chosen(rows, credit=2 + GROWTH_BLOCKS, short=10) == set()


def test_a_row_that_computes_its_prompt_stays():
    rig = Rig({0: 9, 1: 5})
    rig.running[0].computed -= 7
    rig.rm.borrower.credit_opened(3, 40)
    copies, leaving = rig.step(short=9)
    assert {request for request, *_ in copies} == {1}
    assert leaving == [1]


def test_every_creditor_takes_one_row_at_a_time():
    rig = Rig({0: 12, 1: 13, 2: 14})
    rig.rm.borrower.credit_opened(3, 40)
    rig.rm.borrower.credit_opened(5, 40)
    copies, _ = rig.step(short=12)
    assert {(request, creditor) for request, _, creditor in copies} == {(0, 3), (1, 5)}
    _, leaving = rig.step(short=1)
    assert leaving == [0, 1]
    copies, _ = rig.step(short=1)
    assert {(request, creditor) for request, _, creditor in copies} == {(2, 3)}


# -- how it goes --------------------------------------------------------------------------------


def test_sealed_rblocks_are_copied_in_order_and_the_tail_with_the_last_step():
    rig = Rig({0: 2 * COPIED_BLOCKS + 3})
    rig.rm.borrower.credit_opened(3, 40)
    steps = [rig.step() for _ in range(3)]
    assert [leaving for _, leaving in steps] == [[], [], [0]]
    assert [len(copies) for copies, _ in steps] == [COPIED_BLOCKS, COPIED_BLOCKS, 3]
    copied = [index for copies, _ in steps for _, index, _ in copies]
    assert copied == list(range(2 * COPIED_BLOCKS + 3))
    assert rig.rm.slots.usable == 60


def test_a_row_goes_on_growing_while_it_is_copied():
    rig = Rig({0: 2 * COPIED_BLOCKS})
    rig.rm.borrower.credit_opened(3, 40)
    rig.step()
    for _ in range(BLOCK):
        rig.running[0].expect(0)
        rig.running[0].learn(0, 0.0)
        rig.running[0].computed += 1
    rig.rm.grow(0, 1)
    copies, leaving = rig.step()
    assert (len(copies), leaving) == (COPIED_BLOCKS, [])
    copies, leaving = rig.step()
    assert (len(copies), leaving) == (1, [0])


def test_a_row_stays_until_there_is_credit_for_all_of_it():
    rig = Rig({0: COPIED_BLOCKS + 2})
    rig.rm.borrower.credit_opened(3, COPIED_BLOCKS + 2 + GROWTH_BLOCKS)
    rig.step()
    rig.rm.borrower.return_credit(3, 5)
    assert rig.step() == ([], [])
    rig.rm.borrower.credit_opened(3, 1)
    assert rig.step()[1] == [0]


def test_a_row_that_ends_on_the_way_makes_room_for_another():
    rig = Rig({0: 12, 1: 13})
    rig.rm.borrower.credit_opened(3, 40)
    assert {request for request, *_ in rig.step(short=12)[0]} == {0}
    rig.rm.close(0)
    rig.running.pop(0)
    assert {request for request, *_ in rig.step(short=12)[0]} == {1}


# -- in a schedule ------------------------------------------------------------------------------


def two_rows() -> Scheduler:
    """Row 0 fills its rBlocks and needs another one; row 1 has 10 and leaves. The pool is full."""
    config = EngineConfig(15, BLOCK, 8, 64, policy=POLICIES["migrate"])
    scheduler = Scheduler(RManager(0, 15), config, Counters())
    for number, prompt in ((0, 20), (1, 38)):
        request = Request(number, pack_tokens(range(prompt)), Sampling(max_tokens=20))
        sequence = TokenSequence(request, assigned_at=0.0)
        scheduler.adopt(sequence)
        scheduler.rm.open(number)
        scheduler.rm.grow(number, config.blocks(prompt))
        sequence.computed = prompt
        sequence.expect(0)
        sequence.learn(0, 0.0)
    scheduler.rm.borrower.credit_opened(3, 10 + GROWTH_BLOCKS)
    return scheduler


def test_a_row_misses_only_the_step_that_hands_it_over():
    scheduler = two_rows()
    scheduler.rm.close(0)
    scheduler.running.pop(0)
    (row,), leaving = (plan := scheduler.plan()).scheduled, plan.leaving
    assert (row.sequence.id, leaving) == (1, [])
    scheduler.rm.borrower.commit(plan.moves, [])
    row.sequence.computed += 1
    row.sequence.expect(0)
    row.sequence.learn(0, 0.0)
    plan = scheduler.plan()
    assert plan.scheduled == []
    assert [sequence.id for sequence in plan.leaving] == [1]


def test_a_row_that_leaves_is_not_preempted_in_the_same_step():
    """Row 0 is denied what it asked for, so the youngest is preempted; whoever leaves stays."""
    scheduler = two_rows()
    scheduler.apply(Answer(round=0), 1)
    plan = scheduler.plan()
    assert [sequence.id for sequence in plan.leaving] == [0]
    assert 0 in scheduler.rm.tables
    assert 0 not in [row.sequence.id for row in plan.scheduled]


def test_credit_too_small_for_any_row_is_no_reason_to_wait():
    """Nobody fits into it, so the youngest is preempted after some patience, or it is returned."""
    scheduler = two_rows()
    scheduler.rm.borrower.return_credit(3, 9)
    for number in range(6):
        scheduler.apply(Answer(round=number), scheduler.demand().wanted)
        scheduler.plan()
    assert scheduler.counters.preemptions > 0 or scheduler.rm.borrower.debts[3].returned > 9


# -- in a cluster -------------------------------------------------------------------------------


def test_rows_that_migrate_go_on_with_the_same_tokens(model, steady_pace):
    moved = 0
    for seed in range(6):
        rows = migrating_rows(seed)
        outcome = run_cluster(model, rows, 3, options(24, policy="migrate"), SeededSchedule(seed))
        assert outcome.tokens == unconstrained(model, rows)
        assert sum(counters.blocks_borrowed for counters in outcome.counters) == 0
        moved += migrations(outcome)
    assert moved > 0


@pytest.mark.parametrize("seed", range(15))
def test_no_interleaving_of_migrations_deadlocks_or_leaves_a_message(model, seed):
    rows = migrating_rows(seed)
    outcome = run_cluster(model, rows, 3, options(24, policy="migrate"), SeededSchedule(seed))
    assert outcome.tokens == unconstrained(model, rows)
