"""One instance in virtual time: where it stands in its step, and whom it serves meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import Plan
from hpc_distkv.ids import InstanceId
from hpc_distkv.memory.loan import Move

MOST_SERVING = 0.9
"""Share of its time that an instance spends on guests at most while it has a step of its own."""
EXACT_ENOUGH = 1e-7
"""Seconds by which the end of a step may be early."""


class StepLoad(NamedTuple):
    """What the rows of a step compute at home: as in `CostModel.step_time`."""

    decode_rows: int = 0
    decode_kv: float = 0.0
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    new_tokens: int = 0
    """Rows that get a token."""


NO_LOAD = StepLoad()


class DebtorLoad(NamedTuple):
    """A debtor's step at its creditor."""

    seconds: float
    """MicroAttention for it."""
    rate: float
    """The same per second of the debtor's step."""
    outgoing: list[Move]
    incoming: list[Move]


@dataclass(eq=False, slots=True)
class Member:
    """An instance and its step. Guests are served between the layers of the step, so each second
    of serving makes it a second longer."""

    number: InstanceId
    instance: Instance
    plan: Plan | None = None
    """Of the step it is in."""
    load: StepLoad = NO_LOAD
    began: float = 0.0
    computing: float = 0.0
    """Seconds of the step's own work at home."""
    partial_wait: float = 0.0
    """Seconds of the step that it waits for its creditors' partial results."""
    lasting: float = 0.0
    """Seconds of the step without guests: computing, attending in the host's memory, and waiting
    for creditors and moves."""
    exchanging: bool = False
    """Whether rows of the step have rBlocks elsewhere."""
    gaps: float = 0.0
    """Seconds by which layers of the step delay all queries of a debtor's step."""
    creditors: list[Member] = field(default_factory=list)
    """Those that its step visits."""
    visits: dict[int, DebtorLoad] = field(default_factory=dict)
    """Debtor → what is done for its step."""
    _served: float = 0.0
    _counted: float = 0.0
    """Seconds of serving since the step began, up to this moment."""

    def begin(self, now: float, plan: Plan) -> None:
        """A step begins; what it takes is set after this."""
        self.plan, self.began = plan, now
        self.load = NO_LOAD
        self.computing = self.partial_wait = self.lasting = self.gaps = 0.0
        self.exchanging = False
        self._served, self._counted = 0.0, now

    @property
    def rate(self) -> float:
        """Share of its time that goes to guests."""
        return min(MOST_SERVING, sum(visit.rate for visit in self.visits.values()))

    def count_serving(self, now: float) -> None:
        """To be called before `visits` changes."""
        self._served += (now - self._counted) * self.rate
        self._counted = now

    def due(self, now: float) -> float | None:
        """When the step will end if visits stay as they are; None: it has ended."""
        if self.visits:
            self.count_serving(now)
        left = self.began + self.lasting + self._served - now
        return now + left / (1 - self.rate) if left > EXACT_ENOUGH else None

    def delay(self, debtor: int) -> float:
        """Seconds by which this instance, as a creditor, delays the queries of one step of
        `debtor`: until the layer at hand is done, and until other debtors' guests are."""
        others = (visit for number, visit in self.visits.items() if number != debtor)
        return self.gaps + sum(visit.rate * visit.seconds / 2 for visit in others)
