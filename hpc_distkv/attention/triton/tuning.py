"""Which kernel takes which rows, with which tile, cut how finely: the choices and their reasons.

Figures were measured on an H100 (bfloat16, head dimension 128, 8 KV heads of 4 query heads).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from torch import Tensor

from hpc_distkv.attention.triton.worklist import Ints, parts_of

WIDTHS = (16, 256)
"""Padded head dimensions that the kernels are built for."""
MOST_GROUP = 128
"""Query heads per KV head: one query's lines must fit a tile."""
TILE_BYTES = 32 * 1024
"""K and V of a tile."""
WAVES = (0.5, 1, 2, 3, 4, 6, 8, 12, 16)
"""Programs per place that `chunk` tries."""
TAIL = {True: 0.3, False: 0.05}
"""Whether there is more than one wave → the part of the longest program's time that is lost at the
end, because programs are not equally fast."""


@dataclass(frozen=True)
class Processors:
    """What the choices depend on of a device."""

    count: int
    """Streaming multiprocessors."""
    shared_memory: int
    """Bytes that a program may use."""


@dataclass(frozen=True)
class Shape:
    """What they depend on of a call."""

    group: int
    """Query heads per KV head."""
    kv_heads: int
    dim: int
    itemsize: int

    @classmethod
    def of(cls, q: Tensor, k_cache: Tensor) -> Shape:
        """That of `micro_attention` with these."""
        _, kv_heads, _, dim = k_cache.shape
        return cls(q.shape[1] // kv_heads, kv_heads, dim, q.element_size())

    @property
    def width(self) -> int:
        """The head dimension, padded to what a tile can have."""
        return max(WIDTHS[0], power_of_two(self.dim))

    @property
    def key_bytes(self) -> int:
        """K and V of one key and head, in a tile."""
        return 2 * self.width * self.itemsize


@dataclass(frozen=True)
class Kernel:
    """A compiled form of the attention kernel."""

    lines: int
    """Queries × query heads per KV head of a tile."""
    keys: int
    """Of a tile."""
    warps: int
    stages: int
    resident: int
    """Programs that run on a processor at the same time."""
    alone: float
    """How many times faster one is that has a processor for itself."""
    start: int
    """What a program costs beside its keys, in keys."""
    part: int
    """What it costs more if it is part of a cut tile, which must be merged."""

    def shared_memory(self, shape: Shape) -> int:
        """Bytes that a program uses at most: its queries, its tiles of K and V, and what reductions
        and changes of layout need. Small products read the last tile from registers. Of 30 forms
        that Triton 3.7 compiled for compute capabilities 8.0, 8.9 and 9.0, and of 44 for 10.0 and
        12.0, none needed more."""
        tiles = (self.stages - (self.lines < 64)) * self.keys * shape.key_bytes
        return self.lines * shape.width * shape.itemsize + tiles + 5120


@cache
def decode_kernel(shape: Shape, device: Processors) -> Kernel:
    """For rows of few lines: bound by the bytes of K and V, so what counts is how many are on their
    way. Two programs, each with two tiles of 32 KiB ahead or one of 64, keep 128 KiB of a
    processor's coming: 2.9 TB/s, what a copy reaches. Three programs or three tiles were slower,
    one program with one tile far slower. 16 lines are the least that the matrix units take; with
    one query head per KV head 15 of them are idle, and it costs nothing. Where there is more to
    compute for a byte, one program cannot take a processor's share of the bandwidth alone.
    """
    lines = max(16, power_of_two(shape.group))
    keys, warps = _keys(shape), 4
    if shape.itemsize > 2 and shape.width > 128:
        keys, warps = 32, 8
    stages = 3 if keys * shape.key_bytes <= TILE_BYTES else 2
    return _fitted(
        Kernel(lines, keys, warps, stages, 2, alone=2.0, start=32, part=192), shape, device
    )


@cache
def prefill_kernel(shape: Shape, device: Processors) -> Kernel:
    """For rows of many lines: bound by the products. 128 lines of 4 warps, so that two programs fit
    a processor and the softmax of one runs beside the products of the other: 400 TFLOP/s. 8 warps
    (one program) 300 to 390, 64 lines 330 to 360; a third stage leaves room for one program only:
    290. Accumulators of head dimension 256 need 8 warps. float32 has no matrix units to feed, and
    its tiles fill the registers earlier: ten times slower with twice the lines or keys.
    """
    if shape.itemsize > 2:
        lines, warps = (32, 4) if shape.width <= 128 else (16, 8)
        lines = max(lines, power_of_two(shape.group))
        kernel = Kernel(lines, 32, warps, 2, 1, alone=1.0, start=128, part=1280)
    else:
        lines = max(128, power_of_two(shape.group))
        warps = 8 if lines * shape.width > 128 * 128 else 4
        kernel = Kernel(lines, _keys(shape), warps, 2, 2, alone=1.25, start=128, part=1280)
    return _fitted(kernel, shape, device)


@cache
def fits(shape: Shape, device: Processors) -> bool:
    """Whether both kernels can run."""
    kernels = decode_kernel(shape, device), prefill_kernel(shape, device)
    small = shape.width <= WIDTHS[1] and shape.group <= MOST_GROUP
    return small and all(k.shared_memory(shape) <= device.shared_memory for k in kernels)


def chunk(lengths: Ints, heads: int, kernel: Kernel, device: Processors) -> int:
    """Keys that one program takes at most, so that all finish early and at about the same time.

    Every processor runs `resident` programs at a time, those with most keys first. The keys are
    dealt out to one or more such waves, and the cheapest cut wins by this estimate: an even share
    of all, or the longest program if it takes longer though alone on its processor; and what is
    lost at the end. Of cuts tried for 1 to 256 rows of 1 Ki to 1 Mi keys it chose the best within
    1 % on average and 5 % at most.
    """
    places = kernel.resident * device.count
    work = int(lengths.sum()) * heads
    best, least = kernel.keys, np.inf
    most = max(int(lengths.max()), 1)
    cuts = {most // max(work / (places * waves), 2 * kernel.keys) for waves in WAVES}
    for cut in sorted(cuts | {cut + 1 for cut in cuts if cut}):
        size = math.ceil(most / max(cut, 1) / kernel.keys) * kernel.keys
        parts, part = parts_of(lengths, size, kernel.keys)
        extra = kernel.start + kernel.part * (parts > 1)
        longest = float((np.minimum(part, lengths) + extra).max())
        evenly = (work + int((parts * extra).sum()) * heads) / places
        tail = TAIL[int(parts.sum()) * heads > places] * longest
        cost = max(evenly, longest / kernel.alone) + tail
        if cost < least:
            best, least = size, cost
    return best


def combined_parts(most: int, shape: Shape) -> int:
    """Partial results that `combine` loads at once: all of them if registers allow, since a second
    turn waits for memory again (2.2 µs against 3.5 for 32 parts)."""
    return min(power_of_two(most), max(8192 // shape.width, 1))


def _keys(shape: Shape) -> int:
    return min(128, max(64, TILE_BYTES // shape.key_bytes))


def _fitted(kernel: Kernel, shape: Shape, device: Processors) -> Kernel:
    """With fewer keys, then stages, where the device has less shared memory, and with one program
    where two do not fit."""
    while kernel.keys > 16 and kernel.shared_memory(shape) > device.shared_memory:
        kernel = replace(kernel, keys=kernel.keys // 2)
    while kernel.stages > 1 and kernel.shared_memory(shape) > device.shared_memory:
        kernel = replace(kernel, stages=kernel.stages - 1)
    several_fit = kernel.resident * kernel.shared_memory(shape) <= device.shared_memory
    return kernel if several_fit else replace(kernel, resident=1, alone=1.0)


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()
