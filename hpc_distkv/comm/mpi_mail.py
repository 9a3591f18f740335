"""Headers over MPI. Importing this module starts MPI: only `open_mpi` does."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI

from hpc_distkv.comm.transport import Mail
from hpc_distkv.comm.waiter import Waiter


class MpiMail(Mail):
    """Small messages of unknown length: probed, then received.

    A message is matched (Improbe) only by a `take` that returns it, and at most one per peer, so
    what a partner posts ahead of time stays in MPI's queue, in order, for the next `take`.
    Posting never waits, so two ranks that post to each other and then take cannot block.
    """

    def __init__(self, comm: MPI.Comm, waiter: Waiter) -> None:
        self._comm = comm
        self._waiter = waiter
        self._posted: list[tuple[MPI.Request, int, bytes]] = []

    def post(self, peer: int, message: bytes) -> None:
        """Send without waiting. MPI reads the bytes until its request completes."""
        self.poke()
        self._posted.append((self._comm.Isend((message, MPI.BYTE), peer), peer, message))

    def take(self, peers: Sequence[int], what: str) -> dict[int, bytes]:
        """The next message of each of `peers`."""
        arriving: dict[int, tuple[MPI.Request, bytearray]] = {}
        taken: dict[int, bytes] = {}

        def advance(peer: int) -> None:
            if peer not in arriving:
                status = MPI.Status()
                matched = self._comm.Improbe(peer, status=status)
                if matched is None:
                    return
                room = bytearray(status.Get_count(MPI.BYTE))
                arriving[peer] = matched.Irecv((room, MPI.BYTE)), room
            request, room = arriving[peer]
            if request.Test():
                taken[peer] = bytes(room)
                self._waiter.moved()

        def missing() -> list[int]:
            return [peer for peer in peers if peer not in taken]

        def all_taken() -> bool | None:
            for peer in missing():
                advance(peer)
            return len(taken) == len(set(peers)) or None

        self._waiter.until(all_taken, what, missing)
        return taken

    def poke(self) -> None:
        """Let go of messages that have left."""
        self._posted = [item for item in self._posted if not item[0].Test()]

    def drained(self) -> bool:
        """Whether every message has left."""
        self.poke()
        return not self._posted
