"""Files that are replaced in one piece: a reader, and a rerun after kill -9, sees the old or the
new one and nothing else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path


def real_path(path: Path) -> Path:
    """The file that `path` stands for, if it is a symbolic link: what is replaced is the file, and
    what belongs to it lies beside it, whatever it is called by."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def check_replaceable(path: Path) -> None:
    """Whether a file may take the place of what is at `path`, if anything is: not that of a device,
    nor of what this process's own words go to. Raises OSError."""
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


def replace_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write `pieces` beside `path`, put them on the disk, and rename. Raises OSError; then `path`
    is as it was, and nothing lies beside it."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        with fresh.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
