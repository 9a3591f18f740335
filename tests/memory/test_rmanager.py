"""The life of a loan by hand: promise, grant, credit, move, recall, copy, hand-over."""

from __future__ import annotations

import pytest

from hpc_distkv.memory.loan import MoveKind, ProtocolError
from hpc_distkv.memory.rmanager import RManager


def with_credit(blocks: int, one: RManager, other: RManager) -> None:
    """`other` has set `blocks` aside for `one`, and both know it."""
    other.lender.promise(blocks)
    assert other.lender.settle({one.instance: blocks}) == []
    one.borrower.credit_opened(other.instance, other.lender.open_credit(one.instance))


def request_of(rm: RManager, number: int, blocks: int) -> None:
    rm.open(number)
    rm.grow(number, blocks)


def lend(one: RManager, other: RManager, request: int, *indices: int) -> None:
    moves = [one.borrower.move_out(request, index, other.instance) for index in indices]
    hosted = other.lender.host(one.instance, [(move.key, move.block) for move in moves])
    one.borrower.commit(moves, [])
    other.lender.commit([], hosted)


def pair(blocks: int = 4, **others: int) -> tuple[RManager, RManager]:
    return RManager(0, blocks, **others), RManager(1, blocks, **others)


def check(*instances: RManager) -> None:
    for rm in instances:
        rm.check()


# -- promises and grants ------------------------------------------------------------------------


def test_a_grant_beyond_the_promise_is_refused_and_sets_nothing_aside():
    rm = RManager(0, 4)
    rm.lender.promise(2)
    assert rm.lender.settle({1: 2, 2: 1}) == [2]
    assert rm.slots.usable == 2
    assert set(rm.lender.loans) == {1}


@pytest.mark.parametrize("grant", [{0: 1}, {1: -1}, {1: 3}])
def test_a_grant_to_oneself_or_of_less_than_nothing_is_refused(grant):
    rm = RManager(0, 4)
    rm.lender.promise(2)
    assert rm.lender.settle(grant) == [*grant]
    assert rm.slots.usable == 4


def test_what_is_promised_is_not_used_at_home():
    rm = RManager(0, 4)
    assert rm.lender.promise(3) == 3
    assert rm.slots.usable == 1
    rm.lender.settle({})
    assert rm.slots.usable == 4


def test_the_lend_cap_bounds_promises():
    rm = RManager(0, 10, lend_cap=3)
    assert rm.lender.promise(8) == 3
    rm.lender.settle({1: 2})
    assert rm.lender.promise(8) == 1


# -- moves --------------------------------------------------------------------------------------


def test_a_lent_rblock_counts_where_it_is_and_belongs_where_it_came_from():
    one, other = pair()
    with_credit(2, one, other)
    request_of(one, 7, 3)
    lend(one, other, 7, 0, 1)
    check(one, other)
    assert one.tables[7].remote == {1: [0, 1]}
    assert [*one.tables[7].indices] == [2]
    assert (one.slots.free, one.borrower.borrowed, one.held, one.borrower.credit) == (3, 2, 3, 0)
    assert (other.slots.free, other.lender.lent, other.held) == (2, 2, 0)


def test_a_move_is_served_at_home_until_it_is_committed():
    one, other = pair()
    with_credit(1, one, other)
    request_of(one, 7, 2)
    move = one.borrower.move_out(7, 0, 1)
    assert one.tables[7].remote == {}
    assert one.slots.free == 2
    one.check()
    one.borrower.commit([move], [])
    assert one.tables[7].remote == {1: [0]}
    assert one.slots.free == 3


def recall(one: RManager, other: RManager, request: int, *indices: int) -> None:
    home = [one.borrower.bring_home(request, index, other.instance) for index in indices]
    back = other.lender.give_back(one.instance, [(move.key, move.block) for move in home])
    check(one, other)
    one.borrower.commit([], home)
    other.lender.commit(back, [])
    check(one, other)


def test_what_comes_home_is_in_its_place_again():
    one, other = pair()
    with_credit(3, one, other)
    request_of(one, 7, 4)
    lend(one, other, 7, 2, 0, 1)
    recall(one, other, 7, 1)
    table = one.tables[7]
    assert [*table.indices] == [1, 3]
    assert table.remote == {1: [2, 0]}
    assert other.lender.guests[0, 7].indices == [2, 0]
    recall(one, other, 7, 0, 2)
    assert [*table.indices] == [0, 1, 2, 3]
    assert table.remote == {}
    assert not one.borrower.debts
    assert not other.lender.loans
    assert other.slots.free == 4


def test_nothing_comes_home_into_a_full_pool():
    one, other = pair(3)
    with_credit(2, one, other)
    request_of(one, 7, 3)
    lend(one, other, 7, 0, 1)
    one.grow(7, 1)
    one.borrower.bring_home(7, 0, 1)
    with pytest.raises(AssertionError):
        one.borrower.bring_home(7, 1, 1)


# -- ends ---------------------------------------------------------------------------------------


def test_a_request_does_not_end_while_its_rblocks_move():
    one, other = pair(6)
    with_credit(2, one, other)
    for request in (7, 8, 9):
        request_of(one, request, 1)
    lend(one, other, 7, 0)
    one.borrower.bring_home(7, 0, 1)
    one.borrower.move_out(8, 0, 1)
    for request in (7, 8):
        with pytest.raises(AssertionError):
            one.close(request)
    one.close(9)


def test_a_request_that_ends_is_told_to_all_its_creditors():
    one, other = pair()
    third = RManager(2, 4)
    with_credit(1, one, other)
    with_credit(2, one, third)
    request_of(one, 7, 4)
    lend(one, other, 7, 0)
    lend(one, third, 7, 1, 2)
    one.close(7)
    assert one.slots.free == 4
    assert one.borrower.borrowed == 3, "until the creditors are told"
    one.check()
    for creditor in (other, third):
        released, returned, *_ = one.borrower.settle(creditor.instance)
        assert (released, returned) == ([7], 0)
        creditor.lender.evict(0, released)
        assert creditor.slots.usable == 4
    assert not one.borrower.debts


def test_credit_that_is_returned_is_the_creditors_again():
    one, other = pair()
    with_credit(3, one, other)
    one.borrower.return_credit(1, 2)
    assert one.borrower.credit == 1
    released, returned, *_ = one.borrower.settle(1)
    assert (released, returned) == ([], 2)
    other.lender.take_back(0, returned)
    assert other.slots.usable == 3
    check(one, other)


# -- windows ------------------------------------------------------------------------------------


def test_dropped_rblocks_are_free_at_home_at_once_and_at_creditors_once_they_are_told():
    one, other = pair(6)
    with_credit(3, one, other)
    request_of(one, 7, 6)
    lend(one, other, 7, 0, 1, 3)
    one.drop(7, 1)
    one.drop(7, 3)
    assert [*one.tables[7].indices] == [4, 5]
    assert one.tables[7].remote == {1: [3]}
    assert (one.tables[7].start, one.tables[7].blocks, one.slots.free) == (3, 6, 4)
    assert one.borrower.borrowed == 3, "until the creditor is told"
    check(one, other)
    other.lender.evict_dropped(0, one.borrower.settle(1).dropped)
    check(one, other)
    assert (one.borrower.borrowed, other.slots.free) == (1, 5)
    one.grow(7, 1)
    assert [*one.tables[7].indices] == [4, 5, 6]
    one.drop(7, 5)
    other.lender.evict_dropped(0, one.borrower.settle(1).dropped)
    assert (one.borrower.debts, other.lender.loans, other.lender.guests, other.slots.usable) == (
        {},
        {},
        {},
        6,
    )
    check(one, other)


def test_what_was_dropped_is_released_with_a_request_that_ends_before_its_creditor_is_told():
    one, other = pair(6)
    with_credit(2, one, other)
    request_of(one, 7, 4)
    lend(one, other, 7, 0, 1)
    one.drop(7, 2)
    one.close(7)
    check(one, other)
    news = one.borrower.settle(1)
    assert news.dropped == []
    other.lender.evict(0, news.released)
    assert (one.borrower.debts, other.lender.loans, other.slots.usable) == ({}, {}, 6)
    check(one, other)


# -- migration ----------------------------------------------------------------------------------


def copy(one: RManager, other: RManager, request: int, count: int) -> None:
    moves = [one.borrower.copy_out(request, other.instance) for _ in range(count)]
    assert {move.kind for move in moves} == {MoveKind.COPY}
    hosted = other.lender.host(one.instance, [(move.key, move.block) for move in moves])
    one.borrower.commit(moves, [])
    other.lender.commit([], hosted)
    check(one, other)


def test_a_request_is_copied_while_it_grows_and_then_handed_over():
    one, other = pair(6)
    with_credit(4, one, other)
    request_of(one, 7, 3)
    copy(one, other, 7, 2)
    assert [*one.tables[7].indices] == [0, 1, 2], "it is served at home"
    one.grow(7, 1)
    copy(one, other, 7, 2)
    one.hand_over(7)
    other.adopt(0, 7)
    check(one, other)
    assert one.slots.free == 6
    assert (one.borrower.debts, other.lender.loans, other.lender.guests) == ({}, {}, {})
    assert [*other.tables[7].indices] == [0, 1, 2, 3]
    assert (other.slots.free, other.held) == (2, 4)


def test_copies_of_a_request_that_ends_are_freed_at_the_creditor():
    one, other = pair()
    with_credit(3, one, other)
    request_of(one, 7, 3)
    copy(one, other, 7, 2)
    one.close(7)
    released, *_ = one.borrower.settle(1)
    other.lender.evict(0, released)
    check(one, other)
    assert other.slots.usable == 3, "and one of credit is left"
    assert one.borrower.credit == 1


def test_a_request_that_is_not_all_there_is_not_taken_over():
    one, other = pair()
    with_credit(2, one, other)
    request_of(one, 7, 4)
    lend(one, other, 7, 1, 2)
    with pytest.raises(ProtocolError, match="instance 0 handed over request 7"):
        other.adopt(0, 7)


def test_a_request_that_is_here_already_is_not_taken_over():
    one, other = pair()
    with_credit(1, one, other)
    request_of(one, 7, 1)
    request_of(other, 7, 1)
    copy(one, other, 7, 1)
    with pytest.raises(ProtocolError, match="instance 0 handed over request 7"):
        other.adopt(0, 7)


# -- partners that break the protocol -----------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda rm: rm.lender.host(1, [(0, 0)]),
            "instance 1 sent instance 0 an rBlock .* without credit",
        ),
        (lambda rm: rm.lender.take_back(1, 1), "returned 1 rBlocks .* set aside 0"),
        (lambda rm: rm.lender.take_back(1, -1), "returned -1 rBlocks"),
        (
            lambda rm: rm.lender.evict(1, [7]),
            "released request 7, of which instance 0 hosts nothing",
        ),
        (lambda rm: rm.lender.evict_dropped(1, [(7, 2)]), "dropped rBlocks before 2 of request 7"),
        (lambda rm: rm.lender.give_back(1, [(7, 0)]), "calls home rBlock 0 of request 7"),
        (lambda rm: rm.adopt(1, 7), "request 7, of which instance 0 hosts nothing"),
    ],
)
def test_a_partner_that_breaks_the_protocol_is_refused(act, words):
    rm = RManager(0, 4)
    with pytest.raises(ProtocolError, match=words):
        act(rm)
    rm.check()


def test_an_rblock_is_called_home_only_from_where_it_is():
    one, other = pair()
    with_credit(1, one, other)
    request_of(one, 7, 2)
    lend(one, other, 7, 0)
    with pytest.raises(ProtocolError, match="calls home rBlock 1 of request 7"):
        other.lender.give_back(0, [(7, 1)])


def test_credit_is_used_once():
    one, other = pair()
    with_credit(1, one, other)
    other.lender.host(0, [(7, 0)])
    with pytest.raises(ProtocolError, match="without credit"):
        other.lender.host(0, [(7, 1)])
