"""NCCL between the ranks' GPUs, by CuPy. Importing this touches neither."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from hpc_distkv.comm.abort import guarded
from hpc_distkv.comm.gpu.cuda import passed
from hpc_distkv.comm.gpu.fabric import Message
from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import FaultError

OLDEST_CUPY = 14
"""From here on unique ids are bytes."""
INSTALL = "pip install 'hpc-distkv[cuda13]' (or [cuda12], whichever CUDA torch was built for)"


class NcclError(FaultError):
    """The connection to another GPU is gone; the job cannot go on."""


def usable() -> tuple[int, str]:
    """The version of NCCL that CuPy and torch both loaded, as 22809 for 2.28.9, or 0 and why there
    is none. torch is imported first: its NCCL is the one that both should get."""
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        return 0, f"CuPy is missing ({error}): {INSTALL}"
    if int(cupy.__version__.split(".")[0]) < OLDEST_CUPY:
        return 0, f"CuPy {cupy.__version__} is older than {OLDEST_CUPY}: {INSTALL}"
    if not getattr(nccl, "available", True):
        return 0, f"CuPy finds no NCCL: {INSTALL}"
    ours = nccl.get_version()
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    major, minor, patch = version[:3]
    theirs = 10_000 * major + 100 * minor + patch
    if ours != theirs:
        return 0, (
            f"CuPy loaded NCCL {ours} and torch {theirs}, which cannot share a process: install "
            "the nvidia-nccl wheel that torch names, or import nothing that loads another"
        )
    return ours, ""


class Nccl:
    """A fabric (`fabric.Fabric`): one communicator over some ranks.

    The one over all ranks has a stream for all that it does. No other stream waits for that one,
    and it waits for none: messages are asked for when the host has seen that kernels before them
    are over, and used when it has seen them pass. The one of an instance works on whichever stream
    is current, in order with what is computed there.
    """

    def __init__(self, comm: Comm, ranks: range, stream: torch.cuda.Stream | None = None) -> None:
        """Connect this rank's GPU, the current device, with those of `ranks`, which is one of
        several ranges that all ranks of the job fall into. `stream`: for all that it does; None:
        the current one. Collective over the job. Raises NcclError; a rank that does not come ends
        the job after the stall timeout."""
        from cupy.cuda import nccl

        self._nccl: Any = nccl
        self._errors = (nccl.NcclError, KeyError)
        """CuPy knows no name for some codes, and raises KeyError."""
        self._comm, self._ranks, self._stream = comm, ranks, stream
        me = comm.world.rank
        mine = nccl.get_unique_id().hex() if me == ranks[0] else ""
        identity = bytes.fromhex(comm.share(mine)[ranks[0]])
        with self._guarded("NCCL to connect its GPU"):
            try:
                self._communicator = nccl.NcclCommunicator(len(ranks), identity, ranks.index(me))
            except self._errors as error:
                raise NcclError(
                    f"NCCL cannot connect the ranks: {error}; --transport mpi does without it"
                ) from error
            self._connect(comm.device.place)

    def within(self, comm: Comm) -> Nccl:
        """A communicator over the ranks of this rank's instance."""
        return Nccl(comm, comm.world.members)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it is on a GPU."""
        return tensor.is_cuda

    def mark(self) -> torch.cuda.Event:
        """When all is done that the current stream was given."""
        return passed()

    def meet(self, messages: Sequence[Message]) -> torch.cuda.Event:
        """All in one group."""
        self.ask(messages)
        return passed(self._stream)

    def ask(self, messages: Sequence[Message]) -> None:
        """All in one group."""
        stream = self._stream or torch.cuda.current_stream()
        try:
            self._nccl.groupStart()
            for rank, send, tensor in messages:
                call = self._communicator.send if send else self._communicator.recv
                peer, size = self._ranks.index(rank), tensor.nbytes
                call(tensor.data_ptr(), size, self._nccl.NCCL_UINT8, peer, stream.cuda_stream)
            self._nccl.groupEnd()
        except self._errors as error:
            raise NcclError(
                f"NCCL refuses messages with rank {messages[0].peer}: {error}"
            ) from None

    def check(self) -> None:
        """Raise NcclError if a peer is gone, and let go of what waits for it. That may hang itself:
        then the job ends after the stall timeout."""
        try:
            self._communicator.check_async_error()
        except self._errors as error:
            with self._guarded(f"NCCL to give up after {error}"):
                self._communicator.abort()
            raise NcclError(f"a GPU of another rank does not answer any more: {error}") from error

    def close(self) -> None:
        """Destroy the communicator: ranks of a node wait for each other. One that does not come
        ends the job after the stall timeout."""
        with self._guarded("NCCL to let go of its GPU"):
            self._communicator.destroy()

    def _guarded(self, what: str) -> AbstractContextManager[None]:
        """Calls that wait for the other ranks. CuPy and torch let other threads run meanwhile."""
        me = self._comm.world.rank
        return guarded(self._comm, what, [rank for rank in self._ranks if rank != me])

    def _connect(self, device: torch.device) -> None:
        """A byte to and from everybody, all in one group on all ranks: connections are made at
        first use, and make the host wait for the other one's."""
        bytes_out, bytes_in = torch.ones((2, len(self._ranks)), dtype=torch.uint8, device=device)
        self.mark().synchronize()
        messages = [
            Message(peer, send, tensor[at : at + 1])
            for at, peer in enumerate(self._ranks)
            for send, tensor in ((True, bytes_out), (False, bytes_in))
        ]
        self.meet(messages).synchronize()


def refusal(versions: Sequence[tuple[int, str]]) -> str | None:
    """Why ranks that found these (`usable`, by rank) cannot use NCCL; None if they can."""
    for rank, (version, why) in enumerate(versions):
        if not version:
            return f"rank {rank}: {why}"
        if version != versions[0][0]:
            return f"rank 0 has NCCL {versions[0][0]} and rank {rank} has {version}"
    return None
