"""What an instance asks of others, and what it offers them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from hpc_distkv.control.messages.reports import Large
from hpc_distkv.control.messages.requests import NOBODY, work
from hpc_distkv.decide.admission import next_waiting
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.state import CANDIDATES, State, sealed, too_large
from hpc_distkv.decide.swap import preemption_cost
from hpc_distkv.ids import InstanceId, PrefixId
from hpc_distkv.memory.rmanager import RManager

STARVED_GROWTH = 8
"""A starved sequence asks for room to grow by 1/8 of its length: others are preempted, and computed
again, only as often as that pays."""

NO_CREDIT: Mapping[InstanceId, int] = {}


class Demand(NamedTuple):
    """What a report says of memory."""

    wanted: int = 0
    """rBlocks to borrow."""
    wanted_for: int = NOBODY
    """The oldest sequence that lacks some."""
    largest: int = 0
    """Most rBlocks that any of the sequences that lack some can need."""
    starved: bool = False
    """Whether `wanted_for` cannot go on without them."""
    lendable: int = 0
    """rBlocks that others may borrow."""
    surplus: Mapping[InstanceId, int] = NO_CREDIT
    """Creditor → credit that is not needed, to give back."""


def weigh(state: State, starved: bool, planned: Mapping[InstanceId, int]) -> Demand:
    """Expected need against memory and credit. `starved`: the oldest running sequence cannot go on;
    `planned`: creditor → credit that the gManager's plans will use."""
    rm, config, foresight, running = state.rm, state.config, state.foresight, state.running
    lending = config.policy.lending
    held = rm.slots.usable + (rm.borrower.credit if lending else 0)
    if starved and running:
        oldest = running[0]
        growth = max(state.growth, oldest.length // STARVED_GROWTH)
        missing = foresight.missing(oldest, oldest.length + growth)
        return Demand(max(1, missing - held), oldest.id, config.blocks(oldest.final_len), True)
    need = config.reserve if running else 0
    wanted, wanted_for, largest = 0, NOBODY, 0
    for sequence in (*running, *next_admitted(state)):
        need += growth_of(state, sequence)
        if need > held and worth_borrowing(state, sequence):
            wanted, wanted_for = need - held, min(wanted_for, sequence.id)
            largest = max(largest, config.blocks(sequence.final_len))
    if wanted:
        return Demand(wanted, wanted_for, largest)
    surplus: Mapping[InstanceId, int] = NO_CREDIT
    if lending:
        kept = planned if planned and any(sealed(state).values()) else NO_CREDIT
        short = max(0, need - rm.slots.usable)
        surplus = _surplus(rm, rm.borrower.credit - short - sum(kept.values()), kept)
    if not config.policy.sharing:
        return Demand(surplus=surplus)
    rest = max(0, rm.slots.usable + rm.borrower.credit - sum(surplus.values()) - need)
    return Demand(lendable=min(rest, _lendable(state)), surplus=surplus)


def worth_borrowing(state: State, sequence: Sequence) -> bool:
    """True if a sequence that lacks memory should borrow it. It must if it is too large or runs
    alone. Otherwise, with a planner, a waiting sequence waits, and a running one has the youngest
    preempted if that costs less: its tokens computed again once, against an exchange in every step
    that is left."""
    running = state.running
    if not state.config.policy.planner or not running or running == [sequence]:
        return True
    if too_large(state, sequence):
        return True
    youngest = running[-1]
    if sequence.id not in state.rm.tables or sequence is youngest:
        return False
    left = sequence.final_len - sequence.length
    return preemption_cost(state, youngest) > state.calibration.exchange_tokens * left


def next_admitted(state: State) -> list[Sequence]:
    """The sequence that is admitted next, for which memory is asked. With a planner, one that has
    to wait until others end takes nothing now."""
    waits = state.outlook.blocked if state.config.policy.planner else None
    return [sequence for sequence in next_waiting(state) if sequence is not waits]


def growth_of(state: State, sequence: Sequence) -> int:
    """rBlocks that the sequence lacks for its tokens and those of the next control rounds."""
    return state.foresight.missing(sequence, sequence.length + state.growth)


def large_rows(state: State) -> list[Large]:
    """Sequences too large for this instance: all that run, and the oldest that wait."""
    if not state.config.policy.planner:
        return []
    awaited = state.rm.prefixes.awaited
    waiting = (s for s in state.waiting if too_large(state, s) and not awaited(s.keys))
    running = (s for s in state.running if too_large(state, s))
    counted: set[PrefixId] = set()
    return [_large(state, s, counted) for s in (*running, *islice(waiting, CANDIDATES))]


def lacking(state: State) -> int:
    """rBlocks that the oldest waiting sequence lacks to be admitted beside the running ones."""
    return state.outlook.lacking if state.running else 0


def longest(state: State) -> int:
    """Sealed rBlocks at home of the running sequence, or the prefix, that has most of them."""
    return max(sealed(state).values(), default=0)


def _lendable(state: State) -> int:
    """rBlocks that nobody here needs: no running sequence, none that is admitted next, and no new
    ones for their first chunks. While an older request is starved elsewhere, only what is older
    counts; and what was to be kept for loans is not for waiting sequences."""
    orders, foresight, running = state.orders, state.foresight, state.running
    need = 0 if orders.keep or orders.before < NOBODY else state.config.first_chunk
    expected = foresight.expected_kvs([s for s in running if s.id <= orders.before])
    if not orders.keep:
        expected += state.outlook.expected
    growth = foresight.peak(expected) - foresight.at_home(running)
    return max(0, int(state.rm.slots.usable - need - max(0, growth)))


def _surplus(rm: RManager, surplus: int, kept: Mapping[InstanceId, int]) -> dict[InstanceId, int]:
    """Creditor → its part of `surplus`, of the credit beyond what is `kept` of it."""
    parts = {}
    for creditor, debt in rm.borrower.debts.items():
        parts[creditor] = max(0, min(debt.credit - kept.get(creditor, 0), surplus))
        surplus -= parts[creditor]
    return parts


def _large(state: State, sequence: Sequence, counted: set[PrefixId]) -> Large:
    """`counted`: prefixes of others, which count once."""
    rm, foresight = state.rm, state.foresight
    table, end = rm.tables.get(sequence.id), foresight.expected_end(sequence)
    shared = [p for p in rm.prefixes.chain(sequence.id) if p.id not in counted]
    counted.update(prefix.id for prefix in shared)
    held = sum(part.held for part in (*shared, table) if part)
    done = sequence.length - foresight.uncomputed(sequence)
    left = work(done, sequence.length, state.config.attention_tokens)
    return Large(
        sequence.id,
        begun=bool(table) or sequence.id in state.orders.begin,
        held=held,
        blocks=held + foresight.missing(sequence, int(end)),
        prompt=left if sequence.length > done + 1 else 0.0,
        output=end - sequence.length,
    )
