"""What is swapped to the host's memory, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from hpc_distkv.control.messages.requests import work
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.decide.state import State
from hpc_distkv.ids import TableKey
from hpc_distkv.memory.books.swap import SwapMove
from hpc_distkv.memory.prefix import Prefix

GROWTH_TOKENS = 8
"""That a sequence in decode is sure to grow by."""
HOME_BLOCKS = 8
"""rBlocks that come home in one step though no sequence waits for them."""


class Swaps:
    """Chooses what the host's memory is used for. Owner of what moves to and fro in a step.

    Where a sequence that lacks memory gets it from, in this order, and why
    (`Scheduler._make_room` and `_plan_moves` ask in it):

    1. the own pool;
    2. credit at peers: they attend at the speed of their device, beside this rank;
    3. the host's memory. A preempted sequence is swapped out if the copies there and back take less
       time than to compute its KV again, by measured times of both. It comes home in the step
       before the one in which it goes on. Only a sequence larger than the pool has its oldest
       rBlocks there while it runs: in every step the host's processor attends to them, or they are
       copied (`HostTier`), which costs more than to move once what could be at home;
    4. a sequence is preempted and computed again.

    Swapped-out sequences are given up, and computed again, when a running one needs their room.
    """

    def __init__(self) -> None:
        self.freeing = 0
        """rBlocks at home that are free at the end of the step, when the copies have left."""
        self._leaving: list[Sequence] = []
        self._returning: list[Sequence] = []
        self._out: list[SwapMove] = []
        self._home: list[SwapMove] = []

    # -- preempted sequences ---------------------------------------------------------------------

    def swap_out(self, state: State, sequence: Sequence) -> bool:
        """Begin to copy a preempted sequence to the host's memory, and return True, if that pays.
        It leaves when the copies have arrived (`commit`)."""
        rm, config, sealed = state.rm, state.config, _sealed(state, sequence)
        copying = _copying(state, sequence)
        if copying is None or copying > work(
            0, config.block_size * sealed, config.attention_tokens
        ):
            return False
        alone = rm.prefixes.used_alone(sequence.id)
        self.freeing += sum(len(table.slots) for table in (rm.tables[sequence.id], *alone))
        self._out += rm.swap_out(sequence.id, sealed)
        self._leaving.append(sequence)
        return True

    def leaves(self, sequence: Sequence) -> bool:
        """True if the sequence is swapped out in this step."""
        return sequence in self._leaving

    def returns(self, sequence: Sequence) -> bool:
        """True if the sequence's rBlocks come home in this step, and it goes on after it."""
        return sequence in self._returning

    def resume(self, state: State, sequence: Sequence) -> bool:
        """Open the table of a swapped-out sequence, and begin to bring home what has room. Returns
        True if the sequence has to sit out this step for that."""
        rm = state.rm
        in_host = rm.resume(sequence.id, sequence.keys).in_host
        tail = state.foresight.missing(sequence, sequence.length + 1)
        room = max(0, rm.slots.usable - tail)
        home = in_host[max(0, len(in_host) - room) :]
        self._home += [rm.swap.bring_home(sequence.id, index) for index in home]
        if home:
            self._returning.append(sequence)
        return bool(home)

    # -- running sequences -----------------------------------------------------------------------

    def plan(self, state: State, short: int, may_borrow: Callable[[Sequence], bool]) -> None:
        """Send `short` rBlocks of sequences larger than the pool to the host, if no credit can
        come; or bring home what has room until all sequences end."""
        short -= self.freeing
        if short > 0:
            for sequence in sorted(state.running, key=lambda s: s.length, reverse=True):
                if short > 0 and _outgrows(state, sequence) and not may_borrow(sequence):
                    short -= self._spill(state, sequence, short)
        elif not self._out and state.rm.swap.used:
            self._bring_home(state)

    def take_plan(self) -> tuple[list[SwapMove], list[SwapMove]]:
        """The step's moves, to the host's memory and home."""
        moves = self._out, self._home
        self._out, self._home = [], []
        return moves

    def commit(self) -> list[Sequence]:
        """The step's moves have arrived. Returns the sequences that are swapped out now."""
        gone, self._leaving, self._returning, self.freeing = self._leaving, [], [], 0
        return gone

    def _spill(self, state: State, sequence: Sequence, short: int) -> int:
        """Send the oldest rBlocks of a sequence; returns how many."""
        space = state.rm.swap
        blocks = list(islice(_movable(state, sequence), short))
        # Swapped-out sequences that are not on their way now make room, the youngest first.
        leaving = {sequence.id for sequence in self._leaving}
        for request in sorted(space.swapped.keys() - leaving, reverse=True):
            if space.free >= len(blocks):
                break
            space.discard(request)
        blocks = blocks[: space.free]
        self._out += [space.spill(key, index) for key, index in blocks]
        return len(blocks)

    def _bring_home(self, state: State) -> None:
        rm, foresight = state.rm, state.foresight
        room = rm.slots.usable - state.config.reserve
        for sequence in state.running:
            end = max(int(foresight.expected_end(sequence)), sequence.length + GROWTH_TOKENS)
            room -= foresight.missing(sequence, end)
        moving = {(move.key, move.block) for move in self._home}
        there = (
            (key, index)
            for sequence in state.running
            for key, table in rm.parts(sequence.id).items()
            for index in reversed(table.in_host)
        )
        for key, index in islice(
            (block for block in dict.fromkeys(there) if block not in moving),
            max(0, min(room, HOME_BLOCKS)),
        ):
            self._home.append(rm.swap.bring_home(key, index))


def preemption_cost(state: State, sequence: Sequence) -> float:
    """Prompt tokens computed in the time that the sequence's preemption costs: to copy it to the
    host's memory and back, or to compute it again."""
    return min(sequence.length, _copying(state, sequence) or sequence.length)


def may_spill(state: State, sequence: Sequence) -> bool:
    """True if rBlocks of a running sequence that lacks memory can go to the host's."""
    space = state.rm.swap
    room = space.free + sum(len(space.slots[key]) for key in space.swapped)
    return _outgrows(state, sequence) and room > 0 and any(_movable(state, sequence))


def _outgrows(state: State, sequence: Sequence) -> bool:
    """True if the sequence, as long as it is, fills what is not lent of the pool."""
    rm, config = state.rm, state.config
    own = config.num_blocks - rm.lender.lent - config.reserve
    end = min(sequence.length + config.block_size, sequence.final_len)
    return config.blocks(end) > own and sequence.id not in rm.borrower.copies


def _movable(state: State, sequence: Sequence) -> Iterator[tuple[TableKey, int]]:
    """(sequence or prefix, logical index) of its sealed rBlocks at home, the oldest first."""
    rm = state.rm
    moving = {(move.key, move.block) for move in rm.borrower.outgoing}
    moving |= {(move.key, move.block) for move in rm.swap.outgoing}
    own = rm.tables[sequence.id].place(_sealed(state, sequence))
    for key, table in reversed(rm.parts(sequence.id).items()):
        sealed = table.indices if isinstance(table, Prefix) else table.indices[:own]
        yield from ((key, index) for index in sealed if (key, index) not in moving)


def _sealed(state: State, sequence: Sequence) -> int:
    return sequence.computed // state.config.block_size


def _copying(state: State, sequence: Sequence) -> float | None:
    """Prompt tokens computed in the time of the copies if the sequence is swapped out; None: it
    cannot be."""
    sealed = _sealed(state, sequence)
    if not state.config.host_blocks or not state.rm.can_swap_out(sequence.id, sealed):
        return None
    return state.calibration.block_tokens * sealed
