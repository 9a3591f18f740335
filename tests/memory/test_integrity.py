"""The check that other tests rely on finds every kind of damage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_prefix import keys_of
from test_rmanager import lend, request_of, with_credit

from hpc_distkv.memory.prefix import Prefix
from hpc_distkv.memory.rmanager import RManager

LONG, SHORT, SWAPPED = 7, 8, 9
"""Requests: one with rBlocks lent, in the host's memory and on their way there; one that continues
a prefix; one that is swapped out."""


def busy() -> RManager:
    """An instance that has a bit of everything."""
    rm, other = RManager(0, 20, host_blocks=8), RManager(1, 9)
    for request, prompt in enumerate(("aab", "abb"), start=1):
        rm.open(request, keys_of(prompt))
        rm.grow(request, 3)
        rm.prefixes.seal(request, 3)
    rm.close(1)
    rm.open(SHORT, keys_of("abb"))
    rm.grow(SHORT, 1)
    with_credit(2, rm, other)
    request_of(rm, LONG, 4)
    lend(rm, other, LONG, 0)
    rm.swap.commit([rm.swap.spill(LONG, 1)], [])
    rm.swap.spill(LONG, 2)
    request_of(rm, SWAPPED, 2)
    rm.swap.commit(rm.swap_out(SWAPPED, 1), [])
    rm.finish_swap_out(SWAPPED)
    with_credit(3, other, rm)
    request_of(other, 5, 2)
    lend(other, rm, 5, 0)
    rm.borrower.bring_home(LONG, 0, 1)
    return rm


def lose_rblock(rm: RManager) -> None:
    rm.tables[LONG].indices.pop()
    rm.slots.empty.append(rm.tables[LONG].slots.pop())
    rm.tables[LONG].remote[1].append(9)
    rm.tables[LONG].remote_blocks += 1


def put_in(rm: RManager, blocks: dict[int, int]) -> None:
    rm.swap._free.remove(*blocks.values())
    rm.swap.slots[99] = blocks


def last_prefix(rm: RManager) -> Prefix:
    prefix = rm.prefixes.last(SHORT)
    assert prefix is not None
    assert prefix.parent is not None
    return prefix


DAMAGE: dict[str, tuple[Callable[[RManager], object], str]] = {
    "a lost slot": (lambda rm: rm.slots.empty.pop(), "a slot is lost or owned twice"),
    "a slot of two": (
        lambda rm: rm.tables[LONG].slots.__setitem__(0, rm.tables[SHORT].slots[0]),
        "a slot is lost or owned twice",
    ),
    "a guest's slot": (
        lambda rm: rm.lender.guests[1, 5].slots.clear(),
        "a slot is lost or owned twice",
    ),
    "a second move": (
        lambda rm: rm.swap.outgoing.append(rm.swap.outgoing[0]),
        "moves twice at once",
    ),
    "a second move home": (
        lambda rm: rm.borrower.incoming.append(rm.borrower.incoming[0]),
        "moves twice at once",
    ),
    "a count": (lambda rm: setattr(rm.tables[LONG], "remote_blocks", 9), "a count is wrong"),
    "a lost rBlock": (lose_rblock, "a logical rBlock is lost or owned twice"),
    "too much reserved": (lambda rm: setattr(rm.lender, "promised", 99), "more reserved than free"),
    "a count of reserved slots": (
        lambda rm: rm.slots.reserve(1),
        "reserved slots are counted wrongly",
    ),
    "too much lent": (lambda rm: setattr(rm.lender, "lend_cap", 1), "more lent than the cap"),
    "a lost prefix": (
        lambda rm: rm.prefixes.prefixes.pop(last_prefix(rm).id),
        "a prefix is lost",
    ),
    "a gap": (lambda rm: rm.prefixes.join(LONG, last_prefix(rm), ()), "does not continue its"),
    "a parent": (lambda rm: last_prefix(rm).parent.children.clear(), "has another parent"),
    "an orphan": (lambda rm: setattr(last_prefix(rm), "parent", None), "does not begin where"),
    "a key too many": (lambda rm: last_prefix(rm).keys.append(b"abbb"), "rBlocks without keys"),
    "another key": (lambda rm: last_prefix(rm).keys.__setitem__(0, b"x"), "cannot be found"),
    "a user": (lambda rm: setattr(last_prefix(rm), "users", 9), "counts its users wrongly"),
    "a cached rBlock": (lambda rm: setattr(rm.prefixes, "idle", 0), "are counted wrongly"),
    "a debt": (
        lambda rm: setattr(rm.borrower.debts[1], "used", 0),
        "a debt differs from its tables",
    ),
    "a loan": (lambda rm: setattr(rm.lender.loans[1], "used", 0), "differs from its guests"),
    "a lost slot of the host": (
        lambda rm: rm.swap._free.pop(),
        "a slot of the host is lost or owned twice",
    ),
    "a slot of the host of two": (
        lambda rm: rm.swap.slots[LONG].update({1: rm.swap.slots[LONG][2]}),
        "a slot of the host is lost or owned twice",
    ),
    "a slot of the host of nobody": (
        lambda rm: put_in(rm, {0: rm.swap._free[0]}),
        "a slot of the host is nobody's",
    ),
    "nothing where something is swapped out": (
        lambda rm: rm.swap.swapped.update({LONG: 0, 98: 0}),
        "an rBlock in the host is lost",
    ),
    "what is swapped out and served from nowhere": (
        lambda rm: [rm.swap.swapped.update({LONG: 0}), rm.swap.release(LONG, [1])],
        "what is swapped out is not there",
    ),
    "a move of what is swapped out": (
        lambda rm: rm.swap.outgoing.append(rm.swap.outgoing[0]._replace(key=SWAPPED, block=0)),
        "what is swapped out still moves",
    ),
    "a move of what is there": (
        lambda rm: rm.swap.outgoing.append(rm.swap.outgoing[0]._replace(block=1)),
        "an rBlock goes where it is",
    ),
}


def test_an_instance_that_has_a_bit_of_everything_is_sound():
    rm = busy()
    rm.check()
    assert (rm.tables[LONG].remote, rm.tables[LONG].in_host) == ({1: [0]}, [1])
    assert rm.lender.guests
    assert rm.swap.outgoing
    assert rm.borrower.incoming
    assert rm.prefixes.idle
    assert [*rm.swap.swapped] == [SWAPPED]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage):
    rm = busy()
    harm, said = DAMAGE[damage]
    harm(rm)
    with pytest.raises(AssertionError, match=said):
        rm.check()
