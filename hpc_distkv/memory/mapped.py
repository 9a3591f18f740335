"""Memory of the host that is a file."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch


def mapped_memory(size: int, folder: Path) -> torch.Tensor:
    """`size` bytes, uint8, of a file in `folder` that no other process sees. It has no name (or
    loses it at once), so it is gone when the process is, however that ends. Its space is reserved
    here: a write that finds a disk full would kill the process. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder, prefix="hpc-distkv-kv-") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
