"""Opening what has to be a regular file: a pipe would keep whoever opens it waiting."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """The file at `path`, open for reading. Raises OSError, also for what is no regular file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        said = os.strerror(number) if stat.S_ISDIR(mode) else "it is not a regular file"
        raise OSError(number, said, str(path))
    return open(fd, "rb")


def read_regular(path: Path) -> bytes:
    """What a regular file holds. Raises OSError."""
    with open_regular(path) as file:
        return file.read()
