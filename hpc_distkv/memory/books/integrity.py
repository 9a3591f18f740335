"""What must hold in an RManager at every instant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_distkv.memory.loan import HOST, MoveKind

if TYPE_CHECKING:
    from hpc_distkv.memory.prefix import Prefix
    from hpc_distkv.memory.rmanager import RManager


def check_slots(rm: RManager, free: Sequence[int]) -> None:
    """Assert that every slot and every logical rBlock has exactly one owner, and that no more is
    set aside than there is."""
    owned = [*free, *(move.slot for move in rm.incoming)]
    moving = [(m.kind is MoveKind.RECALL, m.peer, m.request, m.block) for m in rm.outgoing]
    moving += [(m.kind is not MoveKind.RECALL, m.peer, m.request, m.block) for m in rm.incoming]
    assert len(set(moving)) == len(moving), "an rBlock moves twice at once"
    for table in rm.tables.values():
        owned += table.slots
        assert table.remote_blocks == sum(map(len, table.remote.values())), "a count is wrong"
        held = sorted(sum(table.remote.values(), list(table.indices)))
        assert held == list(range(table.start, table.blocks)), (
            "a logical rBlock is lost or owned twice"
        )
    for guest in rm.guests.values():
        owned += guest.slots
    slots = range(rm.num_blocks)
    assert sorted(owned) == list(slots), "a slot is lost or owned twice"
    assert rm.usable >= 0, "more set aside than free"
    assert rm.lent <= rm.lend_cap, "more lent than the cap"


def check_prefixes(rm: RManager) -> None:
    """Assert that prefixes follow on each other, and that the counts of their users are right."""
    prefixes, users, idle = rm.prefixes.prefixes, Counter[int](), 0
    assert {key: rm.tables[key] for key in rm.tables if key < 0} == prefixes, "a prefix is lost"
    for request in rm.tables.keys() - prefixes.keys():
        last = rm.prefixes.last(request)
        if last:
            users[last.id] += 1
            assert rm.tables[request].start == last.blocks, "a request does not continue its prefix"
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
            assert not prefix.remote, "what nobody uses is lent"
    counted = {prefix.id: prefix.users for prefix in prefixes.values()}
    assert users == Counter(counted), "a prefix counts its users wrongly"
    assert rm.prefixes.idle == idle, "rBlocks that nobody uses are counted wrongly"


def check_loans(rm: RManager) -> None:
    """Assert that debts and loans are what tables and guests say."""
    for creditor, debt in rm.debts.items():
        used = sum(len(table.remote.get(creditor, ())) for table in rm.tables.values())
        used += sum(m.peer == creditor and m.kind is MoveKind.LEND for m in rm.outgoing)
        used += sum(c.blocks for c in rm.copies.values() if c.creditor == creditor)
        used += sum(debt.released.values()) + sum(d.blocks for d in debt.dropped.values())
        assert debt.used == used, "a debt differs from its tables"
    for debtor, loan in rm.loans.items():
        hosted = sum(len(g.slots) for (d, _), g in rm.guests.items() if d == debtor)
        arriving = sum(
            move.peer == debtor and move.kind is not MoveKind.RECALL for move in rm.incoming
        )
        assert loan.used == hosted + arriving, "a loan's count differs from its guests"


def check_host(rm: RManager) -> None:
    """Assert that every slot in the host's memory has one owner: nobody, a block table that names
    it, a request that is swapped out, or a move there."""
    host = rm.swap
    owned = [slot for blocks in host.slots.values() for slot in blocks.values()]
    assert len(set(owned)) == len(owned) == host.used, "a slot of the host is lost or owned twice"
    arriving = {(m.request, m.block) for m in rm.outgoing if m.peer == HOST}
    for key, blocks in host.slots.items():
        table = rm.tables.get(key)
        served = set(table.remote.get(HOST, ())) if table else set()
        coming = {index for request, index in arriving if request == key}
        assert not served & coming, "an rBlock goes where it is"
        if key in host.swapped:
            assert served | coming <= blocks.keys(), "what is swapped out is not there"
            assert table or not coming, "what is swapped out still moves"
        else:
            assert blocks.keys() == served | coming, "a slot of the host is nobody's"
    named = {key for key, table in rm.tables.items() if HOST in table.remote}
    assert named | host.swapped.keys() <= host.slots.keys(), "an rBlock in the host is lost"


def _keys_before(prefix: Prefix) -> list[bytes]:
    keys: list[bytes] = []
    while parent := prefix.parent:
        keys, prefix = parent.keys + keys, parent
    return keys
