"""Mail between the leaders of instances: headers of debtors' steps, and credit."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.loans import Credit, Header
from hpc_distkv.decide.instance import Instance
from hpc_distkv.ids import InstanceId
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.ranks.events import Arrived, Log, Opened, Served
from hpc_distkv.step.creditor import Creditor


class Mailbox:
    """Reads the mail of other instances' leaders and decides when the step of which debtor begins
    and ends here: one step of a debtor after another. Nothing here waits."""

    def __init__(self, comm: Comm, instance: Instance, creditor: Creditor, log: Log) -> None:
        self._comm, self._log = comm, log
        self._instance, self._creditor = instance, creditor
        self._waiting: dict[int, deque[Header]] = {}
        """Debtor → its headers that were not begun."""

    def open_credits(self) -> None:
        """Set rBlocks aside for debtors, as the answer grants, and tell them."""
        for debtor, blocks in self._instance.credits().items():
            letter = msgspec.msgpack.encode(Credit(blocks))
            self._comm.mail.post(self._comm.world.rank_of(debtor), letter)

    def attend(self) -> None:
        """Read the mail and push on every debtor's step. Never blocks. Raises ProtocolError."""
        while (letter := self._comm.mail.poll()) is not None:
            self._read(*letter)
        self.serve()

    def serve(self) -> None:
        """Push on every debtor's step. Never blocks, and costs next to nothing if there is none."""
        while served := self._creditor.push():
            for debtor in served:
                self._log.record(Served(debtor))
                self._creditor.commit(debtor)
                self._begin_next(debtor)

    def _read(self, rank: int, letter: bytes) -> None:
        try:
            message: Header | Credit = msgspec.msgpack.decode(letter, type=Header | Credit)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the mail of rank {rank} is malformed: {error}") from error
        sender = self._comm.world.instance_of(rank)
        if isinstance(message, Credit):
            self._log.record(Opened(sender, message.blocks))
            self._instance.open_credit(sender, message.blocks)
            return
        self._waiting.setdefault(sender, deque()).append(message)
        if not self._creditor.serves(sender):
            self._begin_next(sender)

    def _begin_next(self, debtor: InstanceId) -> None:
        if headers := self._waiting.get(debtor):
            header, now = headers.popleft(), time.monotonic()
            self._log.record(Arrived(debtor, header, now))
            self._creditor.begin(debtor, header, now)
