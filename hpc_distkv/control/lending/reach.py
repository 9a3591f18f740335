"""How far the rBlocks of a debtor may go."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from hpc_distkv.control.lending.borrow import ANYWHERE
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.reports import Reports

ROOMY = 1.1
"""How much larger than a request the pools within its reach are together."""
PROMPT_ROWS = 1024
"""Query rows for which links are compared with computing."""

ExchangeSeconds = Callable[[int, int], float]


class Reach:
    """The reach of debtors in one round: over links on which the queries of a prompt take no longer
    than computing it, if there is room enough for a request in all; over any otherwise. A row had
    better wait for room nearby than have all its prompt's queries cross a slow network."""

    def __init__(
        self, reports: Reports, links: Links, exchange_seconds: ExchangeSeconds, lending: bool
    ) -> None:
        """`exchange_seconds` as of `GManager`; `lending`: without it rBlocks go anywhere."""
        self._reports, self._links, self._lending = reports, links, lending
        self._exchange_seconds = exchange_seconds

    def wanted(self, debtor: int) -> int:
        """The highest link class of creditors for what the debtor's report wants."""
        return self.of(debtor, int(self._reports["largest"][debtor]))

    def of(self, debtor: int, largest: int) -> int:
        """The same for a request of `largest` rBlocks at the debtor."""
        if not self._lending:
            return ANYWHERE
        classes = self._links.classes(debtor)
        counts = np.bincount(classes)
        counts[classes[debtor]] -= 1
        nearest, *farther = np.flatnonzero(counts).tolist() or [ANYWHERE]
        fast = [c for c in farther if self._exchange_seconds(c, PROMPT_ROWS) <= self._prompt_time]
        reach = max([nearest, *fast])
        room = int(self._reports["capacity"][classes <= reach].sum())
        return reach if room > ROOMY * largest else ANYWHERE

    @cached_property
    def _prompt_time(self) -> float:
        """Seconds of computing PROMPT_ROWS rows; −1 if nobody knows."""
        times = self._reports["prompt_time"]
        known = times > 0
        return PROMPT_ROWS * float(times[known].mean()) if known.any() else -1.0
