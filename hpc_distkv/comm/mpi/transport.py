"""Tensors in host memory over MPI. Importing this module starts MPI: only `open_mpi` does."""

from __future__ import annotations

import torch
from mpi4py import MPI

from hpc_distkv.comm.transport import TO_CREDITOR, Exchange, Pairs, Transport, UnderWay
from hpc_distkv.comm.waiter import Waiter


def octets(tensor: torch.Tensor) -> tuple[MPI.buffer, MPI.Datatype]:
    """The bytes of a contiguous CPU tensor of any type, in place."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE


class MpiTransport(Transport):
    """Moves CPU tensors. A channel is a tag: MPI keeps the order between two ranks on each, and
    the callers of both sides agree on it. Posting never waits."""

    def __init__(self, comm: MPI.Comm, waiter: Waiter) -> None:
        self._comm = comm
        self._under_way = UnderWay(waiter)

    def exchange(
        self, sends: Pairs, recvs: Pairs, send_on: int = TO_CREDITOR, receive_on: int = TO_CREDITOR
    ) -> Exchange:
        """Post sends and receives. Receives come first, so that arriving bytes land in place."""
        requests = [self._comm.Irecv(octets(tensor), peer, receive_on) for peer, tensor in recvs]
        requests += [self._comm.Isend(octets(tensor), peer, send_on) for peer, tensor in sends]
        return MpiExchange(requests, sends, recvs, self._under_way)

    def drained(self) -> bool:
        """Whether all exchanges have completed."""
        return self._under_way.drained()


class MpiExchange(Exchange):
    """Sends and receives under way. It holds its tensors until MPI is done with them."""

    def __init__(
        self,
        requests: list[MPI.Request],
        sends: Pairs,
        recvs: Pairs,
        under_way: UnderWay,
    ) -> None:
        super().__init__(under_way)
        self._requests = requests
        self._recvs = recvs
        self._sends = sends
        self._waiter = under_way.waiter
        self._left = len(requests)

    @property
    def peers(self) -> list[int]:
        """Those that still owe a message or have not fetched one."""
        pairs = [*self._recvs, *self._sends]
        return [
            peer
            for (peer, _), request in zip(pairs, self._requests, strict=True)
            if request != MPI.REQUEST_NULL
        ]

    def _push(self) -> bool:
        if self._left:
            statuses: list[MPI.Status] = []
            finished = MPI.Request.Testsome(self._requests, statuses)
            if finished:
                self._check(finished, statuses)
                self._left -= len(finished)
                self._waiter.moved()
        return not self._left

    def _check(self, finished: list[int], statuses: list[MPI.Status]) -> None:
        """A shorter message than its receive would leave stale bytes in the tensor."""
        for index, status in zip(finished, statuses, strict=False):
            if index < len(self._recvs):
                peer, tensor = self._recvs[index]
                count = status.Get_count(MPI.BYTE)
                assert count == tensor.nbytes, (
                    f"rank {peer} sent {count} bytes where {tensor.nbytes} were expected"
                )
