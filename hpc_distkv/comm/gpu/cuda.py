"""A CUDA device, its streams, and copies beside what it computes. Importing this does not touch it.

Streams of a rank, and what orders them (events alone; the host waits for none of them, but polls):

    compute   the own step; in it stream-ordered exchanges (`meeting_transport`)
    serving   what is computed for debtors, before own kernels that have not begun: of a higher
              priority, for a debtor waits in every layer
    out       copies to the host: each waits for what the stream that asked for it had been given
    into      copies from the host: likewise, for the memory they overwrite may be in use; then
              compute and serving wait for them
    beside    rBlocks to and from the host's memory: likewise, but nothing waits for them unless it
              is told to: what uses rBlocks that moved is asked for when the host has seen their
              end, while compute waits for each piece of staged ones (`step/staging.py`), whose
              buffer is overwritten after what compute was given before

Copies out and copies in never wait for each other, nor for those beside. An own step ends when the
host has seen its last event on compute, and what it used is freed then: so that is not in use any
more, though the next step may be on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from hpc_distkv.comm.device import Device, DeviceError, Event, Fetch, Sight, own_index, upload


def new_stream(priority: int = 0) -> torch.cuda.Stream:
    """A stream of the current device; of a lower number, its kernels come first."""
    return torch.cuda.Stream(priority=priority)  # type: ignore[no-untyped-call]


def passed(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """When all is done that `stream`, or the current one, was given."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class Cuda(Device):
    """One CUDA device."""

    deferred = True

    def __init__(self, index: int) -> None:
        """Make it the current one of this process. Raises DeviceError."""
        try:
            torch.cuda.set_device(index)
            self.place = torch.device("cuda", index)
            self._compute = torch.cuda.current_stream()
            self._serving = new_stream(priority=-1)
            self._out, self._into, self._beside = new_stream(), new_stream(), new_stream()
        except RuntimeError as error:  # how torch says that a device is busy or broken
            raise DeviceError(f"CUDA device {index} cannot be used: {error}") from error

    @property
    def name(self) -> str:
        """For people."""
        return torch.cuda.get_device_name(self.place)

    def serving(self) -> AbstractContextManager[object]:
        """On a stream of its own."""
        return torch.cuda.stream(self._serving)

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All in one copy, ordered as the kernels around it."""
        return upload(tensors, self.place)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetch:
        """One copy for each, ordered as the kernels around it."""
        copies = [self.host_buffer(tensor) for tensor in tensors]
        for tensor, copy in zip(tensors, copies, strict=True):
            copy.copy_(tensor, non_blocking=True)
        return Fetch(copies, self.mark())

    def pin(self, memory: torch.Tensor) -> None:
        """Lock it in place, without torch's allocator, which would take a power of two. It stays so
        for the run."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(code):
            raise RuntimeError(f"CUDA cannot lock {memory.nbytes} bytes (error {int(code)})")

    def copy_beside(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> Event:
        """On a stream of its own."""
        self._beside.wait_event(self.mark())
        return self._copy(self._beside, sources, targets)

    def wait_event(self, event: Event) -> None:
        """On the current stream."""
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream().wait_event(event)

    # -- copies beside what is computed (see `staged.StagingCopies`) ------------------------------

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is on the device."""
        return tensor.is_cuda

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory. torch's allocator keeps it for the run, and knows which copies use it."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        """When all is done that the current stream was given."""
        return passed()

    def copy_out(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Event:
        """Device → host, after all that the current stream was given."""
        self._out.wait_event(self.mark())
        return self._copy(self._out, sources, targets)

    def copy_in(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], after: Event
    ) -> Event:
        """Host → device after `after`, a mark; what is computed from now on comes later."""
        assert isinstance(after, torch.cuda.Event)
        self._into.wait_event(after)
        done = self._copy(self._into, sources, targets)
        for stream in (self._compute, self._serving):
            stream.wait_event(done)
        return done

    def _copy(
        self,
        stream: torch.cuda.Stream,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
    ) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            return self.mark()


def look(wanted: str, local_rank: int) -> Sight:
    """What this rank sees. Starts no CUDA context."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return Sight(0)
    devices = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(own_index(devices, local_rank))
    return Sight(devices, str(properties.uuid), "MIG" in properties.name)
