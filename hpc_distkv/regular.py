"""Regular files: opened to be read, and replaced in one piece.

A pipe would keep whoever opens it waiting, so it is refused. Who reads a file while it is replaced,
and a rerun after kill -9, sees the old one or the new one and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"(.+)\.hpc-distkv-[0-9a-f]{16}\.tmp", re.DOTALL)
"""Names of files that are to take the place of another: of `<name>`."""
TEMPORARY_LENGTH = len(".hpc-distkv-.tmp") + 16
"""Characters that such a name has more."""


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


def real_path(path: Path) -> Path:
    """The file that a symbolic link leads to, or `path` itself. A file is replaced, and has its
    side files, there and not at the link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def check_replaceable(path: Path) -> None:
    """Raise OSError if what is at `path` may not be replaced: if it is no regular file, or the one
    that this process's own messages go to."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    for stream in (1, 2):
        try:
            taken = os.path.samestat(state, os.fstat(stream))
        except OSError:  # it is closed
            continue
        if taken:
            raise OSError(errno.EINVAL, "this program's own messages go there")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, which need not be there."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for a file that is to take its place."""
    return path.with_name(f"{path.name}.hpc-distkv-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write. At the end of the block it is put on the disk and replaces `path`, or
    the file that this links to, with its owner and mode. If the block raises, `path` stays as it
    was, and nothing lies beside it. Raises OSError, also for what may not be replaced."""
    check_replaceable(path)
    path = real_path(path)
    fresh = temporary_path(path)
    file = os.fdopen(_create_like(fresh, path), "wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace `path` by `pieces`: see `replacing`."""
    with replacing(path) as file:
        file.writelines(pieces)


def create_file(path: Path, mode: int = 0o666) -> int:
    """Create a file and open it to be written; `mode` is subject to the umask. Raises OSError, also
    if there is a file or a link of that name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, mode)


def remove_file(path: Path) -> None:
    """Remove `path`, also from the disk, if it is there. Raises OSError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk. Raises OSError."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _create_like(fresh: Path, path: Path) -> int:
    """A new file with the owner and the mode of `path`, if that is there."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return create_file(fresh)
    mode = stat.S_IMODE(state.st_mode) & 0o777
    fd = create_file(fresh, mode)
    with contextlib.suppress(OSError):  # it is another user's: the mode is as narrow all the same
        os.fchown(fd, state.st_uid, state.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(fd, mode)
    return fd
