"""Mail over MPI. Importing this module starts MPI: only `open_mpi` does."""

from __future__ import annotations

from mpi4py import MPI

from hpc_distkv.comm.transport import Mail
from hpc_distkv.comm.waiter import Waiter


class MpiMail(Mail):
    """Small messages of unknown length: probed, then received, one after another.

    Neither posting nor polling ever waits, so two ranks that write to each other cannot block.
    """

    def __init__(self, comm: MPI.Comm, waiter: Waiter) -> None:
        self._comm = comm
        self._waiter = waiter
        self._posted: list[tuple[MPI.Request, bytes]] = []
        self._arriving: tuple[int, MPI.Request, bytearray] | None = None

    def post(self, peer: int, message: bytes) -> None:
        """Send without waiting. MPI reads the bytes until its request completes."""
        self.poke()
        self._posted.append((self._comm.Isend((message, MPI.BYTE), peer), message))

    def poll(self) -> tuple[int, bytes] | None:
        """The next message, when all of it is here. MPI keeps those behind it, in order."""
        if self._arriving is None:
            status = MPI.Status()
            matched = self._comm.Improbe(status=status)
            if matched is None:
                return None
            room = bytearray(status.Get_count(MPI.BYTE))
            self._arriving = status.Get_source(), matched.Irecv((room, MPI.BYTE)), room
        peer, request, room = self._arriving
        if not request.Test():
            return None
        self._arriving = None
        self._waiter.moved()
        return peer, bytes(room)

    def poke(self) -> None:
        """Let go of messages that have left."""
        self._posted = [item for item in self._posted if not item[0].Test()]

    def drained(self) -> bool:
        """Whether every message has left."""
        self.poke()
        return not self._posted
