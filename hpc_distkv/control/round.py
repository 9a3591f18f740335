"""One control round while the gManager answers it."""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np

from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import ANYWHERE, Links
from hpc_distkv.control.messages.reports import Answer, Reports
from hpc_distkv.ids import InstanceId

ROOMY = 1.1
"""How much larger than a request the pools within its reach are together."""
PROMPT_ROWS = 1024
"""Query rows for which links are compared with computing."""


class Round:
    """Owner of what is left of a round's promises, and of its answers.

    `grant` alone turns promised rBlocks into answers. Whoever else has something to say to an
    instance writes it into `answer(instance)`.
    """

    def __init__(
        self, reports: Reports, ledger: DebtLedger, links: Links, lending: bool = True
    ) -> None:
        """`reports`: checked ones; `ledger`: as they say, to be changed by the round's grants;
        `lending`: whether rBlocks of a request may live at other instances."""
        self.reports, self.ledger, self.links = reports, ledger, links
        self.plain = Answer(round=int(reports.round[0]))
        """To all instances that nothing else is said to."""
        self.promised = reports.promised.astype(np.int64)
        """rBlocks that are left of each promise: int64 `[instances]`."""
        self._answers: dict[int, Answer] = {}
        self._lending = lending

    def answer(self, instance: int) -> Answer:
        """The answer to an instance, to be filled in."""
        if instance not in self._answers:
            self._answers[instance] = Answer(round=self.plain.round)
        return self._answers[instance]

    def grant(self, debtor: int, creditor: int, blocks: int) -> None:
        """`debtor` borrows `blocks` rBlocks of what `creditor` has promised."""
        self.promised[creditor] -= blocks
        self.ledger.grant(debtor, creditor, blocks)
        lend = self.answer(creditor).lend
        borrower = InstanceId(debtor)
        lend[borrower] = lend.get(borrower, 0) + blocks
        self.answer(debtor).granted += blocks

    def encode(self) -> list[bytes]:
        """The answers to all instances; all drain, stop and admit as `plain` does."""
        encoder = msgspec.msgpack.Encoder()
        encoded = [encoder.encode(self.plain)] * len(self.reports)
        for instance, answer in self._answers.items():
            answer.admit_before = self.plain.admit_before
            answer.drain, answer.stop = self.plain.drain, self.plain.stop
            encoded[instance] = encoder.encode(answer)
        return encoded

    @cached_property
    def starved(self) -> int | None:
        """The instance of the oldest request that cannot go on."""
        if not self._lending:
            return None
        starved = np.flatnonzero(self.reports.starved).tolist()
        return min(starved, key=self.reports.wanted_for.item, default=None)

    def reach(self, debtor: int, blocks: int | None = None) -> int:
        """The highest link class of creditors for a request of `blocks` rBlocks at the debtor; for
        the largest that wants any if None.

        That is as far as the queries of a prompt take no longer than computing it, if all pools so
        near have room enough for the request; anywhere otherwise. A request had better wait for
        room nearby than have all its prompt's queries cross a slow network.
        """
        if not self._lending:
            return ANYWHERE
        if blocks is None:
            blocks = int(self.reports.largest[debtor])
        classes = self.links.classes(debtor)
        counts = np.bincount(classes)
        counts[classes[debtor]] -= 1
        nearest, *farther = np.flatnonzero(counts).tolist() or [ANYWHERE]
        seconds = self.links.exchange_seconds
        fast = [c for c in farther if seconds(c, PROMPT_ROWS) <= self._prompt_seconds]
        reach = max([nearest, *fast])
        room = int(self.reports.capacity[classes <= reach].sum())
        return reach if room > ROOMY * blocks else ANYWHERE

    @cached_property
    def _prompt_seconds(self) -> float:
        """Seconds of computing PROMPT_ROWS rows; −1 if nobody knows."""
        times = self.reports.prompt_time
        known = times > 0
        return PROMPT_ROWS * float(times[known].mean()) if known.any() else -1.0
