"""The three ways ranks talk, as interfaces: tensors, mail, control rounds.

Each has an MPI implementation (`comm.mpi`) and one of a rank alone (`comm.alone`). Tensors of
GPUs travel over NCCL, by appointment (`comm.gpu.meetings`), or by way of the host
(`comm.gpu.staged`). All of them post first and wait later, so that a step can compute while bytes
travel.

Order is the whole protocol. The n-th tensor that rank a sends to rank b on a channel meets the
n-th receive that b posts from a on that channel, and messages of mail arrive in the order in which
they were posted. There are two channels between instances, since two ranks may be debtor and
creditor of each other at once: from debtors to creditors, and back. The engine derives the order on
each from the headers, so both sides agree by construction. A third one is for the ranks within an
instance, which all take the same steps.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from hpc_distkv.comm.device import Device, Recorded
from hpc_distkv.comm.waiter import Waiter
from hpc_distkv.comm.world import World

T = TypeVar("T")

TO_CREDITOR, TO_DEBTOR, WITHIN = 0, 1, 2
"""The channels of tensors."""

Pairs = Sequence[tuple[int, torch.Tensor]]
"""(peer rank, contiguous tensor) in the order in which the peer sees them."""


class Exchange(ABC):
    """One that was posted and may still be on its way (`Transport.exchange`)."""

    def __init__(self, under_way: UnderWay) -> None:
        self._under_way = under_way
        under_way.add(self)

    def done(self) -> bool:
        """Push the exchange on and tell whether it has completed. Never blocks."""
        if not self._push():
            return False
        self._under_way.over(self)
        return True

    def wait(self, what: str) -> None:
        """Return when every send may be overwritten and every receive has arrived.

        `what` names the exchange for the stall message ("queries, layer 3, step 17").
        Raises StallError if nothing moved for the stall timeout.
        """
        self._under_way.waiter.until(lambda: self.done() or None, what, lambda: self.peers)

    @property
    @abstractmethod
    def peers(self) -> list[int]:
        """The ranks that it still waits for, for the stall message."""

    @abstractmethod
    def _push(self) -> bool:
        """Push on and tell whether all has completed."""


class UnderWay:
    """The exchanges of a transport that have not been seen to complete. It holds them, and so the
    tensors that they hold, whether or not anybody else does."""

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self._pending: dict[Exchange, None] = {}

    def add(self, exchange: Exchange) -> None:
        """An exchange was posted."""
        self._pending[exchange] = None

    def over(self, exchange: Exchange) -> None:
        """It has completed."""
        self._pending.pop(exchange, None)

    def drained(self) -> bool:
        """Push all on and tell whether they have completed. Never blocks."""
        for exchange in list(self._pending):
            exchange.done()
        return not self._pending


class StreamOrdered(Protocol):
    """Exchanges within an instance that are enqueued on the compute stream, as its kernels are. The
    host does not wait for them; what it launches afterwards runs after them.

    All ranks of the instance ask for the same exchanges in the same order, and each must be sure to
    come to every one that another has asked for, whatever becomes of other instances: until then
    the stream stands still.
    """

    def exchange(self, sends: Pairs, recvs: Pairs) -> bool:
        """Enqueue these sends and receives. Returns False, doing nothing, where tensors are not on
        the device."""

    def recording(self, recorded: Recorded) -> AbstractContextManager[object]:
        """In this block the current stream is captured into `recorded`, exchanges included."""

    def replay(self, recorded: Recorded) -> None:
        """Enqueue all that was captured."""


class Transport(ABC):
    """Moves tensors between ranks."""

    stream_ordered: StreamOrdered | None = None
    """For this rank's instance, once `unite` was called; None: this transport has no such way."""

    @abstractmethod
    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Exchange:
        """Post sends and receives, all at once, each on a channel. Tensors must stay untouched
        until it is done; they are contiguous and both sides know their sizes beforehand."""

    def unite(self, comm: Comm) -> None:  # noqa: B027 (most have nothing to do)
        """Instances have been formed: set up `stream_ordered`. Collective over all ranks."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """All ranks are done, and nothing is under way. Collective."""

    def push(self) -> None:  # noqa: B027 (most have nothing to do)
        """Push on what is under way, where it does not get on by itself. Never blocks."""

    def drained(self) -> bool:
        """Whether nothing this rank posted is under way any more. Never blocks."""
        return True


class Mail(ABC):
    """Small messages of unknown length: headers and credit between loan partners, a leader's events
    to its followers; by mail of their own, appointments (`meetings`) and complaints (`stall`)."""

    @abstractmethod
    def post(self, peer: int, message: bytes) -> None:
        """Send without waiting."""

    @abstractmethod
    def poll(self) -> tuple[int, bytes] | None:
        """The next message of anybody and its sender; None if there is none. Never blocks."""

    def drained(self) -> bool:
        """Whether every message this rank posted has left it. Never blocks."""
        return True


class Rounds(ABC):
    """Control rounds: a nonblocking gather of reports to rank 0, a nonblocking scatter of answers.

    Answers are scattered and not broadcast: they carry prompts, which no other rank needs.

    Round k of a rank is: `report` → (compute) → `answer`. Every rank takes part in every round,
    in the same order; on rank 0 `reports` and `reply` serve the gManager beside its own part.
    Nothing here blocks; a rank that has nothing else to do waits with `Comm.idle`.
    """

    @abstractmethod
    def report(self, message: bytes) -> None:
        """Begin a round with this rank's report. The previous round's answer must be taken."""

    @abstractmethod
    def answer(self) -> bytes | None:
        """This rank's answer to its report, once; None while it is not there yet."""

    @abstractmethod
    def reports(self) -> list[bytes] | None:
        """Rank 0: the reports of all ranks of the current round by rank, once; else None."""

    @abstractmethod
    def reply(self, messages: Sequence[bytes]) -> None:
        """Rank 0: send each rank its answer. Follows the `reports` it answers."""

    @abstractmethod
    def awaited(self) -> list[int]:
        """The ranks whose part of the current round is missing here, for the stall message."""

    def drained(self) -> bool:
        """Whether nothing of this rank's rounds is under way any more. Never blocks."""
        return True


@dataclass(eq=False)
class Comm:
    """What one rank has to reach the others."""

    world: World
    transport: Transport
    mail: Mail
    rounds: Rounds
    waiter: Waiter
    abort: Callable[[int], object]
    """End the whole job with this exit status."""
    new_mail: Callable[[], Mail]
    """Mail of its own for one purpose more. Collective."""
    device: Device = field(default_factory=Device, init=False)
    """Where this rank computes: the host's processor until `compute_on` says otherwise."""
    complaints: Mail | None = None
    """To rank 0, of waits that ran out (`comm.stall`)."""
    heard: Callable[[int], str] = field(default_factory=lambda: lambda _: "", init=False)
    """On rank 0: what is known of a rank's last words (`hear`)."""
    closed: bool = field(default=False, init=False)
    """Whether all ranks have agreed that they are done."""
    agreed: BaseException | None = field(default=None, init=False)
    """What this rank raised last when all ranks raised together (`all_raise`)."""

    @property
    def stall_timeout(self) -> float:
        """Seconds without progress after which a wait gives up."""
        return self.waiter.stall_timeout

    def compute_on(self, device: Device, transport: Transport, eager: float | None = None) -> None:
        """From now on this rank computes on `device`, and its tensors travel by `transport`.
        `eager`: seconds for which waits poll before they sleep; None: as long as before."""
        self.device, self.transport = device, transport
        self.waiter.always(transport.push)
        if eager is not None:
            self.waiter.poll_for(eager)

    def form_instances(self, tp: int) -> None:
        """From now on `tp` consecutive ranks are an instance. Raises ValueError if the ranks cannot
        be cut so."""
        self.world = replace(self.world, tp=tp)

    def hear(self, heard: Callable[[int], str]) -> None:
        """From now on a stall says of silent ranks what `heard` knows of their last words."""
        self.heard = heard

    def all_raise(self, error: BaseException | None) -> None:
        """All ranks raise together, this one `error`, so nobody is left waiting. None: they go on,
        as far as is known."""
        self.agreed = error

    def idle(self, ready: Callable[[], T | None], what: str) -> T:
        """Poll `ready` until it gives a value, leaving the core to others meanwhile.

        `what` names the wait in the stall message ("the answer of round 17"). Raises StallError.
        """
        return self.waiter.until(ready, what, self.rounds.awaited)

    def agree(self, error: str | None) -> list[str | None]:
        """What every rank has to say, by rank, on every rank: None where all is well. So a user
        error that only some ranks see makes all of them leave with the same status. Collective;
        no round may be open."""
        return self.share(error)

    def share(self, value: T) -> list[T]:
        """The JSON values of all ranks, by rank, on every rank: one whole control round.
        Collective; no round may be open."""

        def together(messages: list[bytes]) -> bytes:
            return b"[" + b",".join(messages) + b"]"

        values: list[T] = json.loads(self._round(json.dumps(value).encode(), together))
        return values

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, by rank, on rank 0; [] elsewhere: one whole control round.
        Collective; no round may be open."""
        gathered: list[bytes] = []

        def keep(messages: list[bytes]) -> bytes:
            gathered.extend(messages)
            return b""

        self._round(message, keep)
        return gathered

    def _round(self, message: bytes, answer: Callable[[list[bytes]], bytes]) -> bytes:
        """One round in which all ranks get what rank 0 makes of their messages."""
        self.rounds.report(message)

        def everyone() -> bytes | None:
            reports = self.rounds.reports() if self.world.rank == 0 else None
            if reports is not None:
                self.rounds.reply([answer(reports)] * self.world.size)
            return self.rounds.answer()

        return self.idle(everyone, "all ranks to agree")

    def close(self) -> None:
        """Wait until every rank is done and nothing is under way; afterwards a rank may leave with
        any exit status. Collective; no round may be open. A second call does nothing.

        Order: a rank tells the others that it is done once its own sends have left it, and rank 0
        leaves last of all its answers: so nobody tears down a connection that is still in use.
        Do all work before: ranks that leave early spin in MPI's own farewell until the last comes.
        """
        if self.closed:
            return
        self.idle(lambda: self.transport.drained() or None, "the last tensors to be received")
        self.idle(lambda: self.mail.drained() or None, "the last mail to be received")
        self.agree(None)
        self.idle(lambda: self.rounds.drained() or None, "the last answers to be received")
        self.transport.close()
        self.closed = True
