"""A world of one rank, for benches within a larger one: nothing ever travels."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_distkv.comm.transport import (
    TO_CREDITOR,
    Comm,
    Exchange,
    Mail,
    Pairs,
    Rounds,
    Transport,
    UnderWay,
)
from hpc_distkv.comm.waiter import Waiter
from hpc_distkv.comm.world import World


def open_alone(stall_timeout: float = 60.0) -> Comm:
    """The only rank's end."""
    world = World(0, (0,))
    waiter = Waiter(world, stall_timeout)
    transport, rounds = AloneTransport(waiter), AloneRounds()
    return Comm(world, transport, NoMail(), rounds, waiter, lambda status: None, NoMail)


class Complete(Exchange):
    """An exchange with nobody."""

    @property
    def peers(self) -> list[int]:
        """None."""
        return []

    def _push(self) -> bool:
        return True


class AloneTransport(Transport):
    """Exchanges without a peer."""

    def __init__(self, waiter: Waiter) -> None:
        self._under_way = UnderWay(waiter)

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Exchange:
        """Nothing to post."""
        assert not [*sends, *recvs], "an exchange of a rank that is alone"
        return Complete(self._under_way)


class NoMail(Mail):
    """Mail of nobody."""

    def post(self, peer: int, message: bytes) -> None:
        """There is nobody to send to."""
        raise AssertionError("mail of a rank that is alone")

    def poll(self) -> None:
        """Nothing ever comes."""


class AloneRounds(Rounds):
    """Control rounds of rank 0 with itself."""

    def __init__(self) -> None:
        self._reports: list[bytes] = []
        self._answers: list[bytes] = []

    def report(self, message: bytes) -> None:
        """Begin a round."""
        self._reports.append(message)

    def answer(self) -> bytes | None:
        """The answer, once."""
        return self._answers.pop() if self._answers else None

    def reports(self) -> list[bytes] | None:
        """The own report, once."""
        reports, self._reports = self._reports, []
        return reports or None

    def reply(self, messages: Sequence[bytes]) -> None:
        """Answer it."""
        self._answers += messages

    def awaited(self) -> list[int]:
        """Nobody."""
        return []
