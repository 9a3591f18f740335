"""Where compiled kernels are kept for the next run, and nobody but their user can change them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafeError(OSError):
    """Somebody else could have put something there."""


class KernelCache:
    """A folder of libraries, open. What is loaded runs as this user: so the folder and its files
    must belong to the user, and nobody else may write to them. All names are looked up in the open
    folder, whatever becomes of the path to it.

    The name of a library holds what it was built from and the digest of its content, so one that
    is torn or was damaged is not taken, and of ranks that build at once none needs to wait.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[KernelCache]:
        """The cache in `folder`, which is made if need be. Raises UnsafeError and OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, _READ | os.O_DIRECTORY)
        try:
            _check_own(fd, f"{folder}")
            yield cls(fd)
        finally:
            os.close(fd)

    def find(self, key: str) -> Path | None:
        """The library that was built from `key`, to be loaded while the cache is open. One that is
        not what was kept is removed. Raises OSError."""
        for name in sorted(os.listdir(self._fd)):
            if name.startswith(f"{key}-") and name.endswith(".so"):
                if name == _name(key, self._read(name)):
                    return Path(f"/proc/self/fd/{self._fd}/{name}")
                os.unlink(name, dir_fd=self._fd)
        return None

    def keep(self, key: str, library: bytes) -> None:
        """Keep what was built from `key`. Raises OSError."""
        fresh = f"{secrets.token_hex(8)}.tmp"
        try:
            with open(os.open(fresh, _WRITE, 0o600, dir_fd=self._fd), "wb") as file:
                file.write(library)
            os.replace(fresh, _name(key, library), src_dir_fd=self._fd, dst_dir_fd=self._fd)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=self._fd)

    def _read(self, name: str) -> bytes:
        """What a file holds; nothing if it is not this user's alone."""
        try:
            with open(os.open(name, _READ | os.O_NONBLOCK, dir_fd=self._fd), "rb") as file:
                _check_own(file.fileno(), name)
                return file.read()
        except FileNotFoundError:  # another rank has just removed it
            return b""
        except OSError as error:
            log.warning("a compiled kernel is not taken from the cache: %s", error)
            return b""


@contextmanager
def user_cache() -> Iterator[KernelCache | None]:
    """The cache of this user; None if there is no place for it, or none that is safe."""
    with contextlib.ExitStack() as stack:
        cache = None
        try:
            cache = stack.enter_context(KernelCache.open(_folder()))
        except UnsafeError as error:
            log.warning("compiled kernels are not kept: %s", error)
        except OSError as error:  # as a home that compute nodes cannot write
            log.info("compiled kernels are not kept: %s", error)
        yield cache


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base, "hpc_distkv")
    try:
        return Path.home() / ".cache" / "hpc_distkv"
    except RuntimeError as error:  # neither HOME nor an entry among the system's users
        raise FileNotFoundError(f"{error}") from error


def _check_own(fd: int, name: str) -> None:
    state = os.fstat(fd)
    if state.st_uid != os.geteuid():
        raise UnsafeError(f"{name} belongs to another user")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeError(f"others may write to {name}: chmod go-w")
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise UnsafeError(f"{name} is neither a file nor a folder")


def _name(key: str, library: bytes) -> str:
    return f"{key}-{hashlib.sha256(library).hexdigest()}.so"
