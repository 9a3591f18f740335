"""What the decisions of an instance are made on."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from hpc_distkv.control.messages.requests import NOBODY
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.foresight import ExpectedKv, Foresight
from hpc_distkv.decide.pace import Calibration
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.ids import RequestId, TableKey
from hpc_distkv.memory.rmanager import RManager

CANDIDATES = 16
"""Waiting sequences that are looked at in a step."""


class Orders(NamedTuple):
    """What the gManager's answers say of admission."""

    before: int = NOBODY
    """No sequence younger than this is admitted."""
    closed: bool = False
    """No sequence is admitted any more."""
    keep: int = 0
    """rBlocks to leave free for loans to come."""
    begin: frozenset[RequestId] = frozenset()
    """Waiting sequences too large for this instance that are admitted all the same, and borrow."""


class Outlook(NamedTuple):
    """What becomes of the waiting sequences (`admission.outlook`)."""

    expected: list[ExpectedKv]
    """Of those that can be admitted now, and of the oldest that cannot, from its expected begin."""
    blocked: Sequence | None
    """The latter."""
    lacking: int
    """rBlocks that it lacks to be admitted now."""


NOTHING_WAITS = Outlook([], None, 0)


class State(Protocol):
    """A read-only view of the scheduler. `Scheduler` owns all of this and alone writes it; what
    decides on admission, demand, moves, migration and swapping gets it as an argument and returns
    what to do. `Moves`, `Migrations` and `Swaps` also begin the transfers that they choose at the
    RManager, which owns the rBlocks."""

    @property
    def config(self) -> EngineConfig:
        """Sizes and limits."""

    @property
    def rm(self) -> RManager:
        """Who holds which rBlock."""

    @property
    def foresight(self) -> Foresight:
        """The KV that sequences are expected to need."""

    @property
    def waiting(self) -> SequenceOf[Sequence]:
        """Ascending by age, the oldest first."""

    @property
    def running(self) -> SequenceOf[Sequence]:
        """Ascending by age."""

    @property
    def orders(self) -> Orders:
        """Of the gManager."""

    @property
    def calibration(self) -> Calibration:
        """Measured costs."""

    @property
    def outlook(self) -> Outlook:
        """As of the last report."""

    @property
    def growth(self) -> int:
        """Tokens by which a sequence is expected to grow until a loan asked for now can be used."""


def too_large(state: State, sequence: Sequence) -> bool:
    """True if the sequence cannot run with this instance's memory alone and the gManager plans for
    such requests."""
    config = state.config
    own = config.num_blocks - state.rm.lender.lent - config.reserve
    return config.policy.planner and config.blocks(sequence.length + 1) > own


def sealed(state: State) -> dict[TableKey, int]:
    """Running sequence or prefix of one → its sealed rBlocks at home: these may move."""
    size, tables = state.config.block_size, state.rm.tables
    own = {s.id: tables[s.id].place(s.computed // size) for s in state.running}
    return own | {p.id: len(p.slots) for p in state.rm.prefixes.used_by(own)}
