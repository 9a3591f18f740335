"""Where the tensors of a safetensors file lie. No torch here."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from hpc_distkv.model.errors import ModelError

LARGEST_HEADER = 100_000_000
"""Bytes; the library's own limit."""


class StoredTensor(NamedTuple):
    """One tensor of an open file."""

    name: str
    kind: str
    """Such as "BF16"."""
    shape: tuple[int, ...]
    fd: int
    begin: int
    """Offset of its first byte in the file; `end` is behind its last one."""
    end: int


def read_header(fd: int, file: object) -> list[StoredTensor]:
    """The tensors of the open safetensors `file`. Raises ModelError if it is damaged, and
    OSError."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    start = 8 + length
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise ModelError(f"{file} is no safetensors file, or is cut short: download it again")
    try:
        header = json.loads(os.pread(fd, length, 8))
        header.pop("__metadata__", None)
        tensors = [_tensor(name, about, fd, start) for name, about in header.items()]
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise ModelError(f"{file} has a damaged header: download it again") from None
    if any(not start <= tensor.begin <= tensor.end <= size for tensor in tensors):
        raise ModelError(f"{file} is cut short: download it again")
    return tensors


def _tensor(name: str, about: Any, fd: int, start: int) -> StoredTensor:
    begin, end = map(int, about["data_offsets"])
    shape = tuple(map(int, about["shape"]))
    return StoredTensor(name, str(about["dtype"]), shape, fd, start + begin, start + end)
