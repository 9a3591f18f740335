"""What goes to the host's memory, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from itertools import islice

from hpc_distkv.control.assign.work import work
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.foresight import Foresight
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.memory.loan import HOST, Move
from hpc_distkv.memory.rmanager import RManager

SWAP_TOKENS = 1.0
"""Prompt tokens computed while an rBlock leaves for the host's memory and comes back, until it was
measured."""
GROWTH_TOKENS = 8
"""That a row in decode is sure to grow by."""
HOME_BLOCKS = 8
"""rBlocks that come home in one step though no row waits for them."""


class Swaps:
    """Chooses what the host's memory is used for. Pure.

    Where a row that lacks memory gets it from, in this order, and why (`Scheduler._make_room` and
    `_plan_moves` ask in it):

    1. the own pool;
    2. credit at peers: they attend at the speed of their device, beside this rank;
    3. the host's memory. A preempted row is swapped out, if to copy what it has computed there
       and back takes less time than to compute it again, by measured times of both; it comes home
       when the row goes on, in the step before its next one. Only a row that cannot be in the pool
       even if it were alone has its oldest rBlocks there while it runs: they are attended to by the
       host's processor, or copied, in every step (`HostTier`), which costs more than to move once
       what could be at home;
    4. a row is preempted and computed again.

    What is swapped out makes room when a row that runs needs it to go on.
    """

    def __init__(self, rmanager: RManager, config: EngineConfig, foresight: Foresight) -> None:
        self.block_tokens = SWAP_TOKENS
        """Prompt tokens computed while an rBlock leaves and comes back."""
        self.freeing = 0
        """rBlocks at home that what leaves now will free at the end of the step."""
        self._rm, self._config, self._foresight = rmanager, config, foresight
        self._space = rmanager.swap
        self._leaving: list[Sequence] = []
        self._returning: list[Sequence] = []
        self._out: list[Move] = []
        self._home: list[Move] = []

    # -- preempted rows --------------------------------------------------------------------------

    def cost(self, sequence: Sequence) -> float:
        """Tokens computed in the time that it costs if the sequence is preempted."""
        return min(sequence.length, self._copying(sequence) or sequence.length)

    def swap_out(self, sequence: Sequence) -> bool:
        """A running sequence is preempted: keep what it has computed, if that pays. It is gone when
        the copies have arrived (`commit`)."""
        tokens = self._config.block_size * self._sealed(sequence)
        copying = self._copying(sequence)
        if copying is None or copying > work(0, tokens, self._config.attention_tokens):
            return False
        self.freeing += sum(
            len(table.slots)
            for table in (
                self._rm.tables[sequence.id],
                *self._rm.prefixes.used_alone(sequence.id),
            )
        )
        self._out += self._rm.swap_out(sequence.id, self._sealed(sequence))
        self._leaving.append(sequence)
        return True

    def leaves(self, sequence: Sequence) -> bool:
        """Whether the sequence is swapped out in this step."""
        return sequence in self._leaving

    def returns(self, sequence: Sequence) -> bool:
        """Whether the sequence goes on after this step, in which its rBlocks come home."""
        return sequence in self._returning

    def resume(self, sequence: Sequence) -> bool:
        """Open the table of a sequence that was swapped out, and begin to bring home what has room.
        Returns whether it has to sit out this step for that."""
        table = self._rm.resume(sequence.id, sequence.keys)
        in_host = table.remote.get(HOST, [])
        tail = self._foresight.missing(sequence, sequence.length + 1)
        room = max(0, self._rm.usable - tail)
        home = in_host[max(0, len(in_host) - room) :]
        self._home += [self._rm.bring_home(sequence.id, index, HOST) for index in home]
        if home:
            self._returning.append(sequence)
        return bool(home)

    def discard(self, sequence: Sequence) -> None:
        """A waiting sequence will not go on here."""
        self._space.discard(sequence.id)

    # -- rows that run ---------------------------------------------------------------------------

    def helps(self, sequence: Sequence) -> bool:
        """Whether rBlocks of a running sequence that lacks memory can go to the host's."""
        room = self._outgrows(sequence) and self._room() > 0
        return room and next(self._movable(sequence), None) is not None

    def plan(
        self, running: Rows[Sequence], short: int, may_borrow: Callable[[Sequence], bool]
    ) -> None:
        """Send `short` rBlocks of rows larger than the pool to the host, if no credit can come; or
        bring home what has room until all rows end."""
        short -= self.freeing
        if short > 0:
            for sequence in sorted(running, key=lambda s: s.length, reverse=True):
                if short > 0 and self._outgrows(sequence) and not may_borrow(sequence):
                    short -= self._spill(sequence, short)
        elif not self._out and self._space.used:
            self._bring_home(running)

    def take_plan(self) -> tuple[list[Move], list[Move]]:
        """The step's moves, to the host's memory and home."""
        moves = self._out, self._home
        self._out, self._home = [], []
        return moves

    def commit(self) -> list[Sequence]:
        """The step's moves have arrived. Returns the sequences that are swapped out now."""
        gone, self._leaving, self._returning, self.freeing = self._leaving, [], [], 0
        for sequence in gone:
            self._rm.finish_swap_out(sequence.id)
        return gone

    def _spill(self, sequence: Sequence, short: int) -> int:
        """The oldest rBlocks of a sequence go; returns how many."""
        blocks = list(islice(self._movable(sequence), short))
        self._make_room(len(blocks))
        blocks = blocks[: self._space.free]
        self._out += [self._rm.spill(key, index) for key, index in blocks]
        return len(blocks)

    def _bring_home(self, running: Rows[Sequence]) -> None:
        room = self._rm.usable - self._config.reserve
        for sequence in running:
            end = max(int(self._foresight.expected_end(sequence)), sequence.length + GROWTH_TOKENS)
            room -= self._foresight.missing(sequence, end)
        moving = {(move.request, move.block) for move in self._home}
        there = (
            (key, index)
            for sequence in running
            for key, table in self._rm.parts(sequence.id).items()
            for index in reversed(table.remote.get(HOST, []))
        )
        for key, index in islice(
            (block for block in dict.fromkeys(there) if block not in moving),
            max(0, min(room, HOME_BLOCKS)),
        ):
            self._home.append(self._rm.bring_home(key, index, HOST))

    def _make_room(self, blocks: int) -> None:
        """Rows that are swapped out are computed again, the youngest first, if what runs cannot go
        on otherwise. Those that are on their way there now are left alone."""
        leaving = {sequence.id for sequence in self._leaving}
        for request in sorted(self._space.swapped.keys() - leaving, reverse=True):
            if self._space.free >= blocks:
                return
            self._space.discard(request)

    def _room(self) -> int:
        """Slots of the host's memory that what runs can have."""
        return self._space.free + sum(len(self._space.slots[key]) for key in self._space.swapped)

    def _outgrows(self, sequence: Sequence) -> bool:
        """Whether the sequence, as long as it is, fills what is not lent of the pool."""
        own = self._config.num_blocks - self._rm.lent - self._config.reserve
        end = min(sequence.length + self._config.block_size, sequence.final_len)
        return self._config.blocks(end) > own and sequence.id not in self._rm.copies

    def _movable(self, sequence: Sequence) -> Iterator[tuple[int, int]]:
        """(sequence or prefix, logical index) of its sealed rBlocks at home, the oldest first."""
        rm, moving = self._rm, {(m.request, m.block) for m in self._rm.outgoing}
        for key, table in reversed(rm.parts(sequence.id).items()):
            sealed = table.indices if key < 0 else table.indices[: self._at_home(sequence)]
            yield from ((key, index) for index in sealed if (key, index) not in moving)

    def _at_home(self, sequence: Sequence) -> int:
        return self._rm.tables[sequence.id].place(self._sealed(sequence))

    def _sealed(self, sequence: Sequence) -> int:
        return sequence.computed // self._config.block_size

    def _copying(self, sequence: Sequence) -> float | None:
        """Prompt tokens computed in the time of the copies if the sequence is swapped out; None: it
        cannot be."""
        sealed = self._sealed(sequence)
        if not self._config.host_blocks or not self._rm.can_swap_out(sequence.id, sealed):
            return None
        return self.block_tokens * sealed
