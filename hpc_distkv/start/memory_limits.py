"""Limits of this process's memory: of the node, of Slurm, and of its control groups (version 1 or
2). No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

NODE = "the node"
NO_LIMIT = 1 << 60
"""Bytes from which a control group's limit means no limit: version 1 writes nearly 2^63."""


class Version(NamedTuple):
    """The file names of one version of control groups."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    """Lines of memory.stat that count what the kernel drops before it kills a process: the cache of
    files, mapped ones included."""


V1 = Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
V2 = Version(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
)


class Limit(NamedTuple):
    """A limit of the memory that this process and others use together."""

    key: str
    """Processes of a node with the same key share the limit."""
    name: str
    """For people."""
    most: int
    """Bytes."""
    left: int | None
    """Free bytes; None: all that is not resident in the processes that share the limit."""


class Seen(NamedTuple):
    """A process's memory and its limits, as it sees them."""

    resident: int
    """Bytes in use that the kernel cannot drop."""
    given: bool
    """True if the memory is this job's alone."""
    limits: list[Limit]


class Room(NamedTuple):
    """The memory that one process of a node may use."""

    resident: int
    """Bytes that it uses already."""
    left: int
    """Bytes that it may use besides: its equal share of what is free."""
    given: bool
    """True if the memory is this job's alone."""
    limit: Limit
    """The limit that leaves least."""
    sharing: int
    """Processes that share this limit."""

    @property
    def most(self) -> int:
        """Bytes that it may use in all."""
        return self.resident + self.left


def room(own: Seen, node: Sequence[Seen]) -> Room:
    """The room of one of the processes on a `node`, all of which are in it."""
    rooms = []
    for limit in own.limits:
        sharing = [seen for seen in node if limit.key in {other.key for other in seen.limits}]
        left = limit.left
        if left is None:
            left = max(0, limit.most - sum(seen.resident for seen in sharing))
        share = left // len(sharing)
        rooms.append(Room(own.resident, share, own.given, limit, len(sharing)))
    return min(rooms, key=lambda each: each.left)


def look(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Seen:
    """Read this process's memory and limits, in the file system at `root`."""
    status = _fields(root / "proc/self/status", ":")
    resident = sum(_kibibytes(status.get(name)) for name in ("RssAnon", "RssShmem"))
    node = _fields(root / "proc/meminfo", ":")
    available = _kibibytes(node.get("MemAvailable"))
    limits = [*_slurm_limits(environment), *_group_limits(root)]
    alone = _number(environment, "SLURM_CPUS_ON_NODE") >= (os.cpu_count() or 1)
    given = bool(limits) or ("SLURM_JOB_ID" in environment and alone)
    return Seen(resident, given, [*limits, Limit(NODE, NODE, available, available)])


def in_memory(path: Path, root: Path = Path("/")) -> bool:
    """True if a file at `path` takes memory: it is on a tmpfs."""
    mounts = {}
    for line in _lines(root / "proc/self/mountinfo"):
        own, _, other = line.partition(" - ")
        mounts[Path(own.split()[4])] = other.split()[0]
    real = path.resolve()
    around = [mounts[place] for place in (real, *real.parents) if place in mounts]
    return bool(around) and around[0] in ("tmpfs", "ramfs")


def _slurm_limits(environment: Mapping[str, str]) -> Iterator[Limit]:
    for name, unit in (
        ("SLURM_MEM_PER_NODE", ""),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        mebibytes = _number(environment, name)
        if mebibytes:  # 0: all there is
            most = (mebibytes << 20) * max(1, _number(environment, unit))
            yield Limit(name, name, most, None)


def _number(environment: Mapping[str, str], name: str) -> int:
    """The number in a variable of Slurm; 0 if it is none."""
    digits = environment.get(name, "")
    return int(digits) if digits.isdecimal() else 0


def _group_limits(root: Path) -> Iterator[Limit]:
    """The limits of this process's control groups and of their ancestors."""
    for version, mount, group in _groups(root):
        folder = root / mount.relative_to("/") / group
        for _ in range(len(Path(group).parts) + 1):
            limit = _group_limit(folder, version)
            if limit is not None:
                yield limit
            folder = folder.parent


def _groups(root: Path) -> Iterator[tuple[Version, Path, str]]:
    """Version, mount point, and path below it of each control group that counts memory."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[V2] = path
        elif "memory" in controllers.split(","):
            paths[V1] = path
    for line in _lines(root / "proc/self/mountinfo"):
        own, _, other = line.partition(" - ")
        top, mount = own.split()[3:5]
        kind, _, options = other.split()[:3]
        counted = kind == "cgroup" and "memory" in options.split(",")
        version = V2 if kind == "cgroup2" else V1 if counted else None
        if version in paths and version is not None:
            yield version, Path(mount), _below(paths[version], top)


def _below(path: str, top: str) -> str:
    """`path` relative to the mounted `top`. Of a path elsewhere, as in a container, only the top is
    visible."""
    inside = os.path.relpath(path, top)
    return "" if inside.split("/")[0] in (".", "..") else inside


def _group_limit(folder: Path, version: Version) -> Limit | None:
    """The limit of one control group; None if it has none."""
    texts = [text.strip() for name in version.limits for text in _lines(folder / name)]
    usage = [text.strip() for text in _lines(folder / version.usage)]
    most = min((int(text) for text in texts if text.isdecimal()), default=NO_LIMIT)
    if most >= NO_LIMIT or not usage:
        return None
    counted = _fields(folder / "memory.stat", " ")
    reclaimable = sum(int(counted.get(name, 0)) for name in version.reclaimable)
    left = max(0, most - max(0, int(usage[0]) - reclaimable))
    place = folder.stat()
    return Limit(f"{place.st_dev}:{place.st_ino}", f"the control group {folder}", most, left)


def _fields(path: Path, separator: str) -> dict[str, str]:
    pairs = (line.split(separator, 1) for line in _lines(path))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _kibibytes(text: str | None) -> int:
    """Bytes of "1234 kB"."""
    return int(text.split()[0]) << 10 if text else 0


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not empty; [] if it does not exist."""
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError:
        return []
