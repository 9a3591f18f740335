"""Control rounds over MPI collectives. Importing this module starts MPI: only `open_mpi` does.

Order, and why it holds while ranks are in different rounds. There are two communicators:

    up:    (lengths k, Igatherv k), (lengths k+1, Igatherv k+1), ...
    down:  (Iscatter of lengths k, Iscatterv k), (Iscatter k+1, Iscatterv k+1), ...

Every rank posts in exactly this order on each of them: it begins round k+1 only after it has taken
answer k, so after its Iscatterv k has completed and long after its Igatherv k was posted; rank 0
posts Igatherv k before it has `reports` k to `reply` to, and its report k+1 comes after that reply.
A rank that is already in round k+1 has only posted its share of `up` k+1, which MPI keeps until
rank 0 gets there; no rank can be in k+2 before rank 0 has answered k+1.

The lengths go up as one small message per rank instead of an Igather: rank 0 then knows which
ranks have not reported, and the stall message names them. Nothing here blocks, and rank 0's
posts wait for nothing but the reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from mpi4py import MPI

from hpc_distkv.comm.transport import Rounds
from hpc_distkv.comm.waiter import LONGEST_GAP, StallClock, Waiter

Steps = Iterator[None]
"""One half of a round under way: yields whenever it has to wait for MPI."""


def finished(request: MPI.Request, keep: object) -> Steps:
    """Yield until `request` has completed; `keep` are the buffers it uses meanwhile."""
    while not request.Test():
        yield


class MpiRounds(Rounds):
    """Each half of a round is a generator; `poke` resumes those under way."""

    def __init__(self, up: MPI.Comm, down: MPI.Comm, waiter: Waiter) -> None:
        self._up = up
        self._down = down
        self._waiter = waiter
        self._rank = up.Get_rank()
        self._under_way: list[Steps] = []
        self._clock = StallClock()
        self._open = False
        self._gathered = False
        self._missing: set[int] = set()
        self._reports: list[bytes] | None = None
        self._answer: bytes | None = None
        self._lengths = np.zeros(up.Get_size(), dtype=np.int64)
        """Rank 0: the length of every rank's report in the current round."""
        others = range(1, up.Get_size()) if self._rank == 0 else ()
        self._announcements = [up.Recv_init(self._lengths[r : r + 1], r) for r in others]

    def report(self, message: bytes) -> None:
        """Begin a round."""
        assert not self._open, "report before the last round's answer was taken"
        self._open = True
        if self._rank == 0:
            self._begin(self._gather(message))
        else:
            self._missing = {0}
            self._begin(self._send_report(message))
            self._begin(self._receive_answer())
        self.poke()

    def answer(self) -> bytes | None:
        """The answer, once."""
        self.poke()
        answer = self._answer
        if answer is not None:
            self._answer = None
            self._open = False
        return answer

    def reports(self) -> list[bytes] | None:
        """Rank 0: all reports, once."""
        self.poke()
        reports, self._reports = self._reports, None
        self._gathered = self._gathered or reports is not None
        return reports

    def reply(self, messages: Sequence[bytes]) -> None:
        """Rank 0: answer all. Both collectives are posted at once."""
        assert self._gathered, "reply without reports"
        self._gathered = False
        self._begin(self._scatter(messages))
        self._answer = messages[0]

    def awaited(self) -> list[int]:
        """Rank 0: who has not reported. Others: rank 0, until its answer is there."""
        return sorted(self._missing)

    def drained(self) -> bool:
        """Whether all halves have completed."""
        self.poke()
        return not self._under_way

    def poke(self) -> None:
        """Push on whatever is under way. Raises StallError if nothing of it moved for the stall
        timeout, though this rank has other work."""
        for steps in self._under_way[:]:
            if next(steps, steps) is steps:
                self._under_way.remove(steps)
                self._moved()
        # Somewhat later than a wait for the round, which can say more.
        if self._under_way and self._clock.look() > self._waiter.stall_timeout + LONGEST_GAP:
            raise self._waiter.stall("a control round", self.awaited)

    def _moved(self) -> None:
        self._clock.restart()
        self._waiter.moved()

    def _begin(self, steps: Steps) -> None:
        """Post the first requests of `steps` now: the order of calls is the order of posts."""
        if next(steps, steps) is not steps:
            if not self._under_way:
                self._clock.restart()
            self._under_way.append(steps)

    def _send_report(self, message: bytes) -> Steps:
        length = np.array([len(message)], dtype=np.int64)
        announced = self._up.Isend(length, 0)
        gathered = self._up.Igatherv((message, MPI.BYTE), None)
        yield from finished(announced, length)
        yield from finished(gathered, message)

    def _gather(self, message: bytes) -> Steps:
        """Rank 0's side of all reports."""
        self._missing = set(range(1, self._up.Get_size()))
        self._lengths[0] = len(message)
        MPI.Prequest.Startall(self._announcements)
        while self._missing:
            come = MPI.Request.Testsome(self._announcements)
            if come:
                self._missing -= {index + 1 for index in come}
                self._moved()
            else:
                yield
        sizes = self._lengths.tolist()
        offsets = (np.cumsum(self._lengths) - self._lengths).tolist()
        room = bytearray(sum(sizes))
        request = self._up.Igatherv((message, MPI.BYTE), (room, sizes, offsets, MPI.BYTE))
        yield from finished(request, (message, room))
        self._reports = [
            bytes(room[start : start + size]) for start, size in zip(offsets, sizes, strict=True)
        ]

    def _scatter(self, messages: Sequence[bytes]) -> Steps:
        """Rank 0's side of all answers."""
        lengths = np.array([len(message) for message in messages], dtype=np.int64)
        offsets = (np.cumsum(lengths) - lengths).tolist()
        joined = b"".join(messages)
        sized = self._down.Iscatter(lengths, MPI.IN_PLACE)
        sent = self._down.Iscatterv((joined, lengths.tolist(), offsets, MPI.BYTE), MPI.IN_PLACE)
        yield from finished(sized, lengths)
        yield from finished(sent, joined)

    def _receive_answer(self) -> Steps:
        length = np.zeros(1, dtype=np.int64)
        yield from finished(self._down.Iscatter(None, length), length)
        room = bytearray(int(length[0]))
        yield from finished(self._down.Iscatterv(None, (room, MPI.BYTE)), room)
        self._answer = bytes(room)
        self._missing = set()
