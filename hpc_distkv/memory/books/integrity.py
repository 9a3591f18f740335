"""What must hold in an RManager at every instant."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hpc_distkv.ids import RequestId
from hpc_distkv.memory.loan import MoveKind
from hpc_distkv.memory.prefix import Prefix

if TYPE_CHECKING:
    from hpc_distkv.memory.rmanager import RManager


def check(rm: RManager) -> None:
    """Assert that every slot and every logical rBlock has exactly one owner, and that all counts
    agree."""
    _check_slots(rm)
    _check_prefixes(rm)
    _check_loans(rm)
    _check_swap(rm)


def _check_slots(rm: RManager) -> None:
    lender, borrower, swap = rm.lender, rm.borrower, rm.swap
    served = [(m.peer, m.key, m.block) for m in (*lender.outgoing, *lender.incoming)]
    own = [(m.peer, m.key, m.block) for m in (*borrower.outgoing, *borrower.incoming)]
    swapped = [(m.key, m.block) for m in (*swap.outgoing, *swap.incoming)]
    for moving in (served, own, swapped):
        assert len(set(moving)) == len(moving), "an rBlock moves twice at once"
    owned = [*rm.slots.empty, *(move.slot for move in swap.incoming)]
    owned += [move.slot for move in (*lender.incoming, *borrower.incoming)]
    for table in rm.tables.values():
        owned += table.slots
        away = sum(table.remote.values(), table.in_host)
        assert table.remote_blocks == len(away), "a count is wrong"
        assert sorted([*away, *table.indices]) == list(range(table.start, table.blocks)), (
            "a logical rBlock is lost or owned twice"
        )
    for guest in lender.guests.values():
        owned += guest.slots
    assert sorted(owned) == list(range(rm.slots.num_blocks)), "a slot is lost or owned twice"
    reserved = lender.promised + sum(loan.unopened + loan.credit for loan in lender.loans.values())
    assert reserved <= rm.slots.free, "more reserved than free"
    assert reserved == rm.slots.reserved, "reserved slots are counted wrongly"
    assert lender.lent <= lender.lend_cap, "more lent than the cap"


def _check_prefixes(rm: RManager) -> None:
    prefixes, users, idle = rm.prefixes.prefixes, Counter[int](), 0
    tables = {key: table for key, table in rm.tables.items() if isinstance(table, Prefix)}
    assert tables == prefixes, "a prefix is lost"
    for key in rm.tables.keys() - tables.keys():
        if last := rm.prefixes.last(RequestId(key)):
            users[last.id] += 1
            assert rm.tables[key].start == last.blocks, "a request does not continue its prefix"
    for prefix in prefixes.values():
        begin = 0
        if parent := prefix.parent:
            begin = parent.blocks
            users[parent.id] += prefix.users > 0
            assert prefix.id in parent.children, "a prefix has another parent"
        assert prefix.start == begin, "a prefix does not begin where its parent ends"
        assert prefix.held == len(prefix.keys) > 0, "a prefix has rBlocks without keys"
        assert rm.prefixes.match([*_keys_before(prefix), *prefix.keys]) == prefix.blocks, (
            "an rBlock cannot be found"
        )
        if not prefix.users:
            idle += len(prefix.slots)
            assert not prefix.remote_blocks, "what nobody uses is lent"
    counted = {prefix.id: prefix.users for prefix in prefixes.values()}
    assert users == Counter(counted), "a prefix counts its users wrongly"
    assert rm.prefixes.idle == idle, "rBlocks that nobody uses are counted wrongly"


def _check_loans(rm: RManager) -> None:
    for creditor, debt in rm.borrower.debts.items():
        used = sum(len(table.remote.get(creditor, ())) for table in rm.tables.values())
        used += sum(m.peer == creditor and m.kind is MoveKind.LEND for m in rm.borrower.outgoing)
        used += sum(c.blocks for c in rm.borrower.copies.values() if c.creditor == creditor)
        used += sum(debt.released.values()) + sum(d.blocks for d in debt.dropped.values())
        assert debt.used == used, "a debt differs from its tables"
    for debtor, loan in rm.lender.loans.items():
        hosted = sum(len(g.slots) for (d, _), g in rm.lender.guests.items() if d == debtor)
        arriving = sum(move.peer == debtor for move in rm.lender.incoming)
        assert loan.used == hosted + arriving, "a loan's count differs from its guests"


def _check_swap(rm: RManager) -> None:
    """Every slot in the host's memory has one owner: nobody, a block table that names it, a request
    that is swapped out, or a move there."""
    swap = rm.swap
    owned = [slot for blocks in swap.slots.values() for slot in blocks.values()]
    assert len(set(owned)) == len(owned) == swap.used, "a slot of the host is lost or owned twice"
    for key, blocks in swap.slots.items():
        table = rm.tables.get(key)
        served = set(table.in_host) if table else set()
        coming = {move.block for move in swap.outgoing if move.key == key}
        assert not served & coming, "an rBlock goes where it is"
        if key in swap.swapped:
            assert served | coming <= blocks.keys(), "what is swapped out is not there"
            assert table or not coming, "what is swapped out still moves"
        else:
            assert blocks.keys() == served | coming, "a slot of the host is nobody's"
    named = {key for key, table in rm.tables.items() if table.in_host}
    assert named | swap.swapped.keys() <= swap.slots.keys(), "an rBlock in the host is lost"


def _keys_before(prefix: Prefix) -> list[bytes]:
    keys: list[bytes] = []
    while parent := prefix.parent:
        keys, prefix = parent.keys + keys, parent
    return keys
