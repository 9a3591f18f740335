"""Which rBlocks move in a step: at once what rows wait for, behind the compute all else."""

from __future__ import annotations

import pytest

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.moves import Moves
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.loan import MoveKind
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4
FAST = 100 * BLOCK
"""A budget that does not bind."""


class Rig:
    """One instance with rows whose KV is all at home, and credit elsewhere."""

    def __init__(self, tokens: dict[int, int], num_blocks: int = 50, budget: int = FAST) -> None:
        """`tokens`: request → tokens with KV."""
        self.rm = RManager(0, num_blocks)
        self.moves = Moves()
        config = EngineConfig(num_blocks, BLOCK, move_budget=budget)
        self.scheduler = Scheduler(self.rm, config, Counters())
        for number, count in tokens.items():
            self.scheduler.adopt(self._sequence(number, count))

    def _sequence(self, number: int, tokens: int) -> TokenSequence:
        request = Request(number, pack_tokens(range(tokens + 1)), Sampling(max_tokens=99))
        sequence = TokenSequence(request, assigned_at=0.0)
        sequence.computed = tokens
        self.rm.open(number)
        self.rm.grow(number, -(-tokens // BLOCK))
        return sequence

    def lend(self, creditor: int, *rblocks: tuple[int, int]) -> None:
        """Have some rBlocks there already."""
        self.rm.borrower.credit_opened(creditor, len(rblocks))
        self.rm.borrower.commit(
            [self.rm.borrower.move_out(*rblock, creditor) for rblock in rblocks], []
        )

    def step(
        self, short: int = 0, growth: int = 0
    ) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """(request, rBlock, creditor) of what leaves and of what comes home in one step."""
        out, home = self.moves.plan(self.scheduler, short, lambda: growth)
        self.rm.check()
        assert all(move.kind is MoveKind.LEND for move in out)
        assert all(move.kind is MoveKind.RECALL for move in home)
        self.rm.borrower.commit(out, home)
        self.rm.check()
        return (
            [(move.key, move.block, move.peer) for move in out],
            [(move.key, move.block, move.peer) for move in home],
        )

    def answer(self, **fields: object) -> None:
        self.moves.apply(Answer(round=0, **fields))


def steps(rig: Rig, count: int) -> list[tuple[int, int]]:
    """How many rBlocks leave and come home in each of some steps."""
    return [tuple(map(len, rig.step())) for _ in range(count)]


# -- what rows wait for -------------------------------------------------------------------------


def test_what_rows_wait_for_moves_at_once_whatever_the_budget():
    rig = Rig({0: 41}, budget=0)
    rig.rm.borrower.credit_opened(3, 8)
    out, _ = rig.step(short=6)
    assert out == [(0, index, 3) for index in range(6)]


def test_no_more_moves_than_there_is_credit_and_never_the_tail():
    rig = Rig({0: 11, 1: 3})
    rig.rm.borrower.credit_opened(3, 8)
    out, _ = rig.step(short=6)
    assert out == [(0, 0, 3), (0, 1, 3)], "the third rBlock is not full"
    rig = Rig({0: 41})
    rig.rm.borrower.credit_opened(3, 2)
    out, _ = rig.step(short=6)
    assert len(out) == 2


def test_the_longest_rows_give_first():
    rig = Rig({0: 9, 1: 17, 2: 13})
    rig.rm.borrower.credit_opened(3, 20)
    out, _ = rig.step(short=8)
    assert [request for request, *_ in out] == [1] * 4 + [2] * 3 + [0]


def test_a_row_goes_on_where_it_is_hosted_already_and_else_where_most_credit_is():
    rig = Rig({0: 41, 1: 21})
    rig.lend(3, (0, 0))
    rig.rm.borrower.credit_opened(3, 2)
    rig.rm.borrower.credit_opened(5, 4)
    out, _ = rig.step(short=3)
    assert [creditor for *_, creditor in out] == [3, 3, 5]
    out, _ = rig.step(short=2)
    assert [creditor for *_, creditor in out] == [5, 5]


# -- what the gManager planned ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0, [0] * 6), (1, [0, 0, 0, 1, 0, 0]), (2, [0, 1, 0, 1, 0, 1]), (4, [1] * 6), (8, [2] * 6)],
)
def test_planned_moves_keep_to_the_budget_of_every_step(budget, expected):
    rig = Rig({0: 81}, budget=budget)
    rig.rm.borrower.credit_opened(3, 20)
    rig.answer(shed={3: 20})
    assert [out for out, _ in steps(rig, 6)] == expected


def test_an_unused_budget_is_not_saved_up():
    rig = Rig({0: 81}, budget=BLOCK)
    steps(rig, 50)
    rig.rm.borrower.credit_opened(3, 20)
    rig.answer(shed={3: 20})
    assert [out for out, _ in steps(rig, 4)] == [2, 1, 1, 1], "one rBlock of it at most"


def test_planned_moves_end_with_the_plan_and_go_nowhere_else():
    rig = Rig({0: 81})
    rig.rm.borrower.credit_opened(3, 20)
    rig.rm.borrower.credit_opened(5, 20)
    rig.answer(shed={5: 3})
    out, _ = rig.step()
    assert out == [(0, index, 5) for index in range(3)]
    assert rig.step()[0] == []


def test_planned_moves_wait_for_their_credit():
    rig = Rig({0: 81})
    rig.answer(shed={5: 3})
    assert rig.moves.sheddable(rig.rm) == {}
    assert rig.step()[0] == []
    rig.rm.borrower.credit_opened(5, 2)
    assert rig.moves.sheddable(rig.rm) == {5: 2}
    assert len(rig.step()[0]) == 2
    rig.rm.borrower.credit_opened(5, 2)
    assert len(rig.step()[0]) == 1


def test_plans_of_several_rounds_add_up():
    rig = Rig({0: 81})
    rig.rm.borrower.credit_opened(3, 20)
    rig.answer(shed={3: 2})
    rig.answer(shed={3: 3})
    assert len(rig.step()[0]) == 5


def test_what_moves_because_it_must_serves_the_plan_as_well():
    rig = Rig({0: 81}, budget=0)
    rig.rm.borrower.credit_opened(3, 20)
    rig.answer(shed={3: 4})
    assert len(rig.step(short=3)[0]) == 3
    assert rig.moves.sheddable(rig.rm) == {3: 1}


# -- what comes home ----------------------------------------------------------------------------


def test_as_many_come_home_as_were_called():
    rig = Rig({0: 41})
    rig.lend(3, *[(0, index) for index in range(5)])
    rig.answer(recall={3: 2})
    assert rig.step()[1] == [(0, 0, 3), (0, 1, 3)]
    assert rig.step()[1] == []


def test_a_new_round_replaces_what_was_called_home():
    rig = Rig({0: 41}, budget=BLOCK)
    rig.lend(3, *[(0, index) for index in range(5)])
    rig.answer(recall={3: 4})
    assert len(rig.step()[1]) == 1
    rig.answer()
    assert steps(rig, 3) == [(0, 0)] * 3


def test_requests_with_fewest_rblocks_there_come_home_first():
    rig = Rig({0: 41, 1: 41})
    rig.lend(3, (0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    rig.answer(recall={3: 3})
    assert rig.step()[1] == [(1, 0, 3), (1, 1, 3), (0, 0, 3)]


def test_the_budget_counts_both_ways_together():
    rig = Rig({0: 81}, budget=2 * BLOCK)
    rig.lend(3, (0, 0), (0, 1), (0, 2))
    rig.rm.borrower.credit_opened(5, 1)
    rig.answer(recall={3: 3}, shed={5: 1})
    assert steps(rig, 3) == [(1, 1), (0, 2), (0, 0)]


def test_into_a_full_pool_only_as_many_come_home_as_there_is_room():
    rig = Rig({0: 40}, num_blocks=10)
    rig.lend(3, *[(0, index) for index in range(6)])
    rig.rm.open(9)
    rig.rm.grow(9, 5)
    assert rig.rm.slots.usable == 1
    rig.answer(recall={3: 6})
    assert steps(rig, 2) == [(0, 1), (0, 0)]


@pytest.mark.parametrize(("growth", "home"), [(0, 6), (4, 4), (7, 1), (8, 0), (20, 0)])
def test_nothing_comes_home_into_room_that_those_who_run_will_take(growth, home):
    rig = Rig({0: 40}, num_blocks=12)
    rig.lend(3, *[(0, index) for index in range(6)])
    assert rig.rm.slots.usable == 8
    rig.answer(recall={3: 6})
    assert len(rig.step(growth=growth)[1]) == home


def test_every_creditors_part_comes_home():
    rig = Rig({0: 41})
    rig.lend(3, (0, 0), (0, 1))
    rig.lend(5, (0, 2), (0, 3))
    rig.answer(recall={3: 1, 5: 1})
    assert [creditor for *_, creditor in rig.step()[1]] == [3, 5]
