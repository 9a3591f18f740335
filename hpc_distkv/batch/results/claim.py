"""The claim of a results file: a job that is started twice by mistake runs once."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.results.side_files import claim_path
from hpc_distkv.regular import create_file, open_regular, read_regular, real_path, temporary_path

log = logging.getLogger(__name__)

HEARTBEAT = 3.0
"""Seconds between two signs of life."""
STALE = 20.0
"""Seconds for which a run that wants a claim looks for a sign of life of its owner."""
SETTLE = 0.5
"""Seconds after which runs that take over the same void claim look who was last."""


_PREFIX = b'{"host":'
"""First bytes of a claim file: those of the first field of its owner."""


class Owner(msgspec.Struct, frozen=True):
    """A run that claims a results file."""

    host: str
    machine: str
    """Differs between machines, their boots, and between containers with process numbers of their
    own."""
    pid: int
    began: str
    """When the process began: process numbers are used again."""
    job: str
    """Slurm's job id, or nothing."""
    token: str
    since: float = 0.0
    """When the run took it, in seconds since the epoch by its own clock; 0: unknown."""

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            began=_process_start(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID", ""),
            token=secrets.token_hex(8),
            since=time.time(),
        )

    @property
    def lives(self) -> bool | None:
        """Whether its process is there; None: it cannot be seen from here."""
        if self.machine != _machine():
            return None
        return _process_start(self.pid) == self.began

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Claim:
    """A run's right to write to one results file: the file `<output>.claim` says whose it is.

    There are no locks, since many cluster file systems have none. A run creates the file, which
    succeeds for one only, and touches it every few seconds from a thread. A run that was killed
    leaves its claim behind: it is void at once if its process is known to be gone, and otherwise
    when a run that wants it has not seen it touched for `STALE` seconds; so clocks need not agree.
    Whoever was suspended for so long and lost it finds out before its next write (`check`).
    """

    def __init__(self, output: Path, owner: Owner, fd: int) -> None:
        self.output = output
        """The results file itself, not a link to it."""
        self._path = claim_path(output)
        self._owner, self._fd = owner, fd
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, output: Path, sleep: Callable[[float], None] = time.sleep) -> Claim:
        """Claim `output`. Waits for `STALE` seconds at most, until it is known whether another
        claim is void. Raises JournalError if it is not, or if nothing can be written there."""
        output = real_path(output)
        path = claim_path(output)
        try:
            owner = Owner.here()
            fd = _create(path, owner)
            if fd is None:
                _wait_until_void(path, output, sleep)
                fd = _take_over(path, owner, sleep)
        except OSError as error:
            raise JournalError(
                f"cannot use {output} for the results: {error.strerror or error}."
            ) from error
        if fd is None:
            raise _taken(output, read_claim(output))
        return cls(output, owner, fd)

    def check(self) -> None:
        """Raise JournalError if another run has taken over."""
        if _read(self._path) == self._owner:
            return
        why = (
            f"another run has taken over {self.output}: this one gave no sign of life for "
            f"{STALE:g} s"
        )
        if not self._path.exists():
            why = f"{self._path} was removed, so that another run may write to {self.output}"
        raise JournalError(f"{why}. What this one has written is safe.")

    def release(self) -> None:
        """Let others write. A second call does nothing."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        os.close(self._fd)
        if _read(self._path) == self._owner:
            with contextlib.suppress(OSError):  # then it is void as soon as this process is gone
                self._path.unlink()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        """Touches this run's own file, even if another one has taken its place."""
        while not self._over.wait(HEARTBEAT):
            try:
                os.utime(self._fd)
            except OSError:
                return  # `check` finds out what became of the file


def read_claim(output: Path) -> Owner | None:
    """Whose a results file is; None: nobody's, as far as can be seen."""
    owner = _read(claim_path(output))
    return None if owner is None or owner.lives is False else owner


def _create(path: Path, owner: Owner) -> int | None:
    """A new claim, open; None if there is one."""
    try:
        fd = create_file(path)
    except FileExistsError:
        return None
    try:
        os.write(fd, msgspec.json.encode(owner))
        os.fsync(fd)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def _wait_until_void(path: Path, output: Path, sleep: Callable[[float], None]) -> None:
    """Return when the claim is void. Raises JournalError when its owner shows that it lives, or if
    it is no claim."""
    _check_claim(path)
    seen, waited = _touched(path), 0.0
    while waited < STALE:
        owner, touched = _read(path), _touched(path)
        lives = owner.lives if owner else None
        if touched is None or lives is False:
            return
        if touched != seen or lives:
            raise _taken(output, owner)
        if not waited:
            log.warning("%s claims %s: waiting for a sign of life", owner or "somebody", output)
        sleep(HEARTBEAT / 2)
        waited += HEARTBEAT / 2


def _take_over(path: Path, owner: Owner, sleep: Callable[[float], None]) -> int | None:
    """Replace a void claim; None if another run has done so. Of several at once, the last one has
    the claim."""
    fresh = temporary_path(path)
    fd = _create(fresh, owner)
    assert fd is not None
    try:
        fresh.replace(path)
    except OSError:
        os.close(fd)
        fresh.unlink(missing_ok=True)
        raise
    sleep(SETTLE)
    if _read(path) == owner:
        return fd
    os.close(fd)
    return None


def _check_claim(path: Path) -> None:
    """Raise JournalError if the file there is neither a claim nor the prefix of one."""
    try:
        content = b"?" if path.is_symlink() else read_regular(path)
    except FileNotFoundError:
        return
    if not _PREFIX.startswith(content[: len(_PREFIX)]) and content.strip(b"\0"):
        raise JournalError(
            f"{path} is not this program's, and in its way: move it, or give another output."
        )


def _taken(output: Path, owner: Owner | None) -> JournalError:
    return JournalError(
        f"another run writes to {output}: {owner or 'its claim has just come'}. Wait until it ends "
        "or stop it, or give another output."
    )


def _read(path: Path) -> Owner | None:
    """Whose claim it is; None if there is none, or none that can be read."""
    try:
        return msgspec.json.decode(read_regular(path), type=Owner)
    except (OSError, ValueError, RecursionError):
        return None


def _touched(path: Path) -> int | None:
    """When the claim was touched last, in ns of the file system's clock; None: it is gone."""
    try:
        with open_regular(path) as file:  # opening it makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _process_start(pid: int) -> str | None:
    """When the process began, in the kernel's ticks; None: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
