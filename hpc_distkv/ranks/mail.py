"""The mail of a rank. Within an instance it is the leader's log: all that changes the instance from
outside, as events for the other lanes. Between leaders it is headers of steps, and credit."""

from __future__ import annotations

import time
import zlib
from collections import deque

import msgspec

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.loans import Credit, Header
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.pace import StepSeconds
from hpc_distkv.decide.plan import Plan
from hpc_distkv.ids import InstanceId
from hpc_distkv.memory.loan import ProtocolError
from hpc_distkv.step.creditor import Creditor


class Boundary(msgspec.Struct, frozen=True, array_like=True, tag="boundary"):
    """The answer of the current round is applied, and the next report is sent."""

    now: float


class StepBegun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    """A step is planned."""

    now: float
    plan: int
    """`fingerprint` of the plan."""


class Advanced(msgspec.Struct, frozen=True, array_like=True, tag="advanced"):
    """The rows of the step count as computed: the next step is planned before it ends."""


class StepEnded(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """The oldest step under way has ended with these tokens; its rows count as computed."""

    tokens: list[int]
    now: float


class StepTimed(msgspec.Struct, frozen=True, array_like=True, tag="timed"):
    """The step took so long on the leader."""

    seconds: StepSeconds


class Arrived(msgspec.Struct, frozen=True, array_like=True, tag="arrived"):
    """A debtor's header is applied; its step is served from now on."""

    debtor: InstanceId
    header: Header
    now: float


class Served(msgspec.Struct, frozen=True, array_like=True, tag="served"):
    """A debtor's step has been served."""

    debtor: InstanceId


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="opened"):
    """A creditor has set rBlocks aside for this instance."""

    creditor: InstanceId
    blocks: int


class Returned(msgspec.Struct, frozen=True, array_like=True, tag="returned"):
    """The run is over: all credit goes back to its creditors."""

    now: float


class Left(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    """All loans are settled everywhere. The last event."""


Event = (
    Boundary
    | StepBegun
    | Advanced
    | StepEnded
    | StepTimed
    | Arrived
    | Served
    | Opened
    | Returned
    | Left
)


def fingerprint(plan: Plan) -> int:
    """A CRC-32 of the plan: replicas with different plans differ in it, but for one in 2³²."""
    rows = [(sequence.id, count) for sequence, count in plan.scheduled]
    moves = [(m.key, m.block, m.slot, m.peer) for m in (*plan.moves, *plan.recalls)]
    swaps = [(m.key, m.block, m.slot) for m in (*plan.to_host, *plan.from_host)]
    return zlib.crc32(repr((rows, moves, swaps, [s.id for s in plan.leaving])).encode())


class Log:
    """Sends the leader's events to the other lanes, in order, by mail. Costs next to nothing
    without other lanes."""

    def __init__(self, comm: Comm) -> None:
        self._mail = comm.mail
        self._followers = range(comm.world.rank + 1, comm.world.rank + comm.world.tp)

    @property
    def followed(self) -> bool:
        """True if there are other lanes."""
        return bool(self._followers)

    def record(self, event: Event) -> None:
        """Send `event`, which happens here now. Never waits."""
        if self._followers:
            message = msgspec.msgpack.encode(event)
            for rank in self._followers:
                self._mail.post(rank, message)


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
            message = msgspec.msgpack.encode(Credit(blocks))
            self._comm.mail.post(self._comm.world.rank_of(debtor), message)

    def attend(self) -> None:
        """Read the mail and push on every debtor's step. Never blocks. Raises ProtocolError."""
        while (message := self._comm.mail.poll()) is not None:
            self._read(*message)
        self.serve()

    def serve(self) -> None:
        """Push on every debtor's step. Never blocks, and costs next to nothing if there is none."""
        while served := self._creditor.push():
            for debtor in served:
                self._log.record(Served(debtor))
                self._creditor.commit(debtor)
                self._begin_next(debtor)

    def _read(self, rank: int, encoded: bytes) -> None:
        try:
            message: Header | Credit = msgspec.msgpack.decode(encoded, type=Header | Credit)
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
