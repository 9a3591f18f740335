"""Which kernel takes which rows, with which tile, cut how finely: the choices and their reasons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpc_distkv.attention.worklist import Ints

WIDTHS = (16, 256)
"""Padded head dimensions that the kernels are built for."""
MOST_GROUP = 128
"""Query heads per KV head: one query's lines must fit a tile."""


@dataclass(frozen=True)
class Processors:
    """What the choices depend on of a device."""

    count: int
    """Streaming multiprocessors."""
    shared_memory: int
    """Bytes that the programs resident on one of them may use together."""


@dataclass(frozen=True)
class Shape:
    """What they depend on of a call."""

    group: int
    """Query heads per KV head."""
    kv_heads: int
    dim: int
    itemsize: int

    @property
    def width(self) -> int:
        """The head dimension, padded to what a tile can have."""
        return max(WIDTHS[0], power_of_two(self.dim))


@dataclass(frozen=True)
class Kernel:
    """A compiled form of the attention kernel."""

    lines: int
    """Queries × query heads per KV head of a tile."""
    keys: int
    warps: int
    stages: int
    resident: int
    """Programs that run on a processor at the same time."""
    start: int
    """What a program costs beside its keys, in keys."""


def decode_kernel(shape: Shape, device: Processors) -> Kernel:
    """For rows of a few lines: bound by the bytes of K and V, so what counts is how many are on
    their way."""
    lines = max(16, power_of_two(shape.group))
    row = 2 * shape.width * shape.itemsize
    keys = min(128, max(16, 32768 // row))
    stages = 3
    resident = max(1, min(2, device.shared_memory // (stages * keys * row + 8192)))
    return Kernel(lines, keys, 4, stages, resident, 128)


def prefill_kernel(shape: Shape, device: Processors) -> Kernel:
    """For rows of many lines: bound by the products, so what counts is the size of the tile."""
    row = 2 * shape.width * shape.itemsize
    keys = min(64, max(16, 32768 // row))
    lines = max(128 if shape.itemsize == 2 else 64, power_of_two(shape.group))
    stages = 3 if 3 * keys * row + lines * row // 2 <= device.shared_memory else 2
    return Kernel(lines, keys, 8 if lines >= 128 else 4, stages, 1, 512)


def chunk(lengths: Ints, heads: int, kernel: Kernel, device: Processors) -> int:
    """Keys that one program takes at most, so that all finish at about the same time.

    Programs run in waves of as many as are resident. For one to eight waves, the keys are dealt out
    evenly and what the waves cost is estimated; the cheapest wins. So few long rows are cut until
    they fill the device, many rows stay whole or are cut just enough to fill the last wave.
    """
    places = kernel.resident * device.count
    work = int(lengths.sum()) * heads
    best, least = 0, np.inf
    for waves in range(1, 9):
        size = -(-work // (places * waves))
        size = max(-(-size // kernel.keys), 4) * kernel.keys
        programs = int(np.maximum(-(-lengths // size), 1).sum()) * heads
        cost = -(-programs // places) * (min(size, int(lengths.max())) + kernel.start)
        if cost < least:
            best, least = size, cost
    return best


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()
