"""NCCL between the ranks' GPUs, by CuPy. Importing this touches neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hpc_distkv.comm.cuda import new_stream, passed
from hpc_distkv.comm.device import Event
from hpc_distkv.comm.meetings import Message
from hpc_distkv.comm.transport import Comm

OLDEST_CUPY = 14
"""From here on unique ids are bytes."""
INSTALL = "pip install 'hpc-distkv[cuda13]' (or [cuda12], whichever CUDA torch was built for)"


class NcclError(RuntimeError):
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
    """A fabric (`meetings.Fabric`): one communicator over all ranks, and one stream for all that it
    does. No other stream waits for this one, and it waits for none: messages are asked for when the
    host has seen that kernels before them are over, and used when it has seen them pass."""

    def __init__(self, comm: Comm) -> None:
        """Connect this rank's GPU, the current device, with all others. Collective. Raises
        NcclError."""
        from cupy.cuda import nccl

        self._nccl: Any = nccl
        world = comm.world
        mine = nccl.get_unique_id().hex() if world.rank == 0 else ""
        identity = bytes.fromhex(comm.share(mine)[0])
        self._stream = new_stream(priority=-1)
        try:
            self._communicator = nccl.NcclCommunicator(world.size, identity, world.rank)
        except nccl.NcclError as error:
            raise NcclError(f"NCCL cannot connect the ranks: {error}") from error
        self._connect(range(world.size))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it is on a GPU."""
        return tensor.is_cuda

    def mark(self) -> torch.cuda.Event:
        """When all is done that the current stream was given."""
        return passed()

    def meet(self, messages: Sequence[Message]) -> Event:
        """All in one group."""
        stream = self._stream.cuda_stream
        try:
            self._nccl.groupStart()
            for peer, send, tensor in messages:
                call = self._communicator.send if send else self._communicator.recv
                call(tensor.data_ptr(), tensor.nbytes, self._nccl.NCCL_UINT8, peer, stream)
            self._nccl.groupEnd()
        except self._nccl.NcclError as error:
            raise NcclError(
                f"NCCL refuses messages with rank {messages[0].peer}: {error}"
            ) from None
        return passed(self._stream)

    def check(self) -> None:
        """Raise NcclError if a peer is gone, and let go of what waits for it."""
        try:
            self._communicator.check_async_error()
        except Exception as error:  # CuPy knows no name for some codes, and raises KeyError
            self._communicator.abort()
            raise NcclError(f"a GPU of another rank does not answer any more: {error}") from error

    def _connect(self, peers: Sequence[int]) -> None:
        """A byte to and from everybody, all in one group on all ranks: connections are made at
        first use, and make the host wait for the other one's."""
        bytes_out, bytes_in = torch.ones((2, len(peers)), dtype=torch.uint8, device="cuda")
        torch.cuda.current_stream().synchronize()
        self.meet(
            [
                Message(peer, send, tensor[at : at + 1])
                for at, peer in enumerate(peers)
                for send, tensor in ((True, bytes_out), (False, bytes_in))
            ]
        )
        self._stream.synchronize()


def refusal(versions: Sequence[tuple[int, str]]) -> str | None:
    """Why ranks that found these (`usable`, by rank) cannot use NCCL; None if they can."""
    for rank, (version, why) in enumerate(versions):
        if not version:
            return f"rank {rank}: {why}"
        if version != versions[0][0]:
            return f"rank 0 has NCCL {versions[0][0]} and rank {rank} has {version}"
    return None
