"""Sequences that change their home."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hpc_distkv.control.messages.loans import Handover
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.memory.rmanager import RManager


class Handovers:
    """Sequences that this instance hands over to others, and those that it gets. One that comes
    back while the step that handed it over is not over here has to wait for that. Pure."""

    def __init__(
        self,
        rmanager: RManager,
        scheduler: Scheduler,
        sequence: Callable[[Request, float], Sequence],
    ) -> None:
        """`sequence`: makes one of a request and the moment at which it was assigned."""
        self.adopted: list[int] = []
        """Requests of which the gManager has to hear that they are here."""
        self._rm, self._scheduler, self._sequence = rmanager, scheduler, sequence
        self._arriving: dict[int, list[Sequence]] = {}
        """Debtor → what the header that is being served hands over."""
        self._back: list[tuple[int, Sequence]] = []
        """What came back while the step that handed it over was not over here."""

    def leave(self, sequences: Iterable[Sequence]) -> int:
        """The step that hands these over has ended. Returns how many they are."""
        count = 0
        for sequence in sequences:
            self._scheduler.hand_over(sequence)
            if sequence.id in self.adopted:  # its next home says where it is
                self.adopted.remove(sequence.id)
            count += 1
        for debtor, sequence in self._back:
            self._adopt(debtor, sequence)
        self._back.clear()
        return count

    def arrive(self, debtor: int, handovers: Iterable[Handover], now: float) -> None:
        """A header hands these over; their rBlocks are here when its step is over."""
        self._arriving[debtor] = [self._restored(handover, now) for handover in handovers]

    def settle(self, debtor: int) -> None:
        """The step of that header is over."""
        for sequence in self._arriving.pop(debtor):
            if sequence.id in self._rm.tables:
                self._back.append((debtor, sequence))
            else:
                self._adopt(debtor, sequence)

    def _adopt(self, debtor: int, sequence: Sequence) -> None:
        self._rm.adopt(debtor, sequence.id)
        self._scheduler.adopt(sequence)
        self.adopted.append(sequence.id)

    def _restored(self, handover: Handover, now: float) -> Sequence:
        def moment(age: float | None) -> float | None:
            return None if age is None else now - age

        sequence = self._sequence(handover.request, now - handover.assigned_age)
        sequence.restore(handover.tokens, handover.computed, handover.logprobs)
        sequence.first_token_at = moment(handover.first_token_age)
        sequence.last_token_at = moment(handover.last_token_age)
        return sequence


def handover(sequence: Sequence, now: float) -> Handover:
    """All that its next home has to know of a sequence; clocks differ, so moments are ages."""

    def age(moment: float | None) -> float | None:
        return None if moment is None else now - moment

    return Handover(
        request=sequence.request,
        tokens=sequence.packed,
        computed=sequence.computed,
        assigned_age=now - sequence.assigned_at,
        first_token_age=age(sequence.first_token_at),
        last_token_age=age(sequence.last_token_at),
        logprobs=sequence.packed_logprobs,
    )
