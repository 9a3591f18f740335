"""What limits memory is found where the kernel and Slurm write it; file systems are made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from hpc_distkv.start.memory_limits import NODE, Limit, Seen, in_memory, look, room

MIB = 1 << 20
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_CPU = "36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct"
V2_MOUNT = "30 23 0:26 {top} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,memory_recursiveprot"
NONE = {"memory.max": "max", "memory.high": "max", "memory.current": 5 * MIB}
V1_NONE = 9223372036854771712


class Node:
    """A file system of a node that has 8000 MiB available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal: 16384000 kB\nMemAvailable: 8192000 kB\nHugetlb: 0 kB")
        self.write("proc/self/status", "Name:\tpython\nRssAnon:\t 3072 kB\nRssShmem:\t 1024 kB\n")
        self.write("proc/self/mountinfo", "23 1 0:2 / / rw - ext4 /dev/sda rw\n")

    def write(self, path: str, text: object) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def join(self, groups: str, *mounts: str) -> None:
        """Be in these control groups."""
        self.write("proc/self/cgroup", groups)
        self.write("proc/self/mountinfo", "\n".join(mounts))

    def group(self, path: str, files: Mapping[str, object]) -> None:
        for name, text in files.items():
            self.write(f"{path}/{name}", text)

    def v1(self, path: str, limit: int, usage: int, cache: int = 0) -> None:
        stat = f"cache 1\ninactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 0"
        files = {"limit_in_bytes": limit, "usage_in_bytes": usage, "stat": stat}
        folder = f"/sys/fs/cgroup/memory/{path}"
        self.group(folder, {f"memory.{name}": text for name, text in files.items()})

    def v2(self, path: str, most: object, usage: int, mount: str = "/sys/fs/cgroup") -> None:
        files = {"memory.max": most, "memory.high": "max", "memory.current": usage}
        self.group(f"{mount}/{path}", files)

    def left(self, **environment: str) -> int:
        """MiB that one process here may take."""
        seen = look(self.root, environment)
        return room(seen, [seen]).left // MIB


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_node_without_limits_gives_what_is_available(node: Node) -> None:
    seen = look(node.root, {})
    assert seen == Seen(4 * MIB, False, [Limit(NODE, NODE, 8000 * MIB, 8000 * MIB)])
    assert room(seen, [seen] * 4).most == 2004 * MIB


@pytest.mark.parametrize(
    ("slurm", "mib"),
    [
        ({"SLURM_MEM_PER_NODE": "0"}, 8000),  # all there is
        ({"SLURM_MEM_PER_NODE": "700"}, 696),
        ({"SLURM_MEM_PER_NODE": "9000"}, 8000),
        ({"SLURM_MEM_PER_CPU": "100"}, 96),
        ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}, 396),
        ({"SLURM_MEM_PER_GPU": "200", "SLURM_GPUS_ON_NODE": "3"}, 596),
        ({"SLURM_MEM_PER_NODE": "3"}, 0),
        ({"SLURM_MEM_PER_NODE": "all", "SLURM_CPUS_ON_NODE": "4(x2)"}, 8000),  # no numbers
        ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "abc"}, 96),
    ],
)
def test_slurm_may_allow_less_than_there_is(slurm: dict[str, str], mib: int, node: Node) -> None:
    """Of which what is resident already is a part."""
    assert node.left(**slurm) == mib


def test_ranks_have_slurms_limit_together(node: Node) -> None:
    seen = look(node.root, {"SLURM_MEM_PER_NODE": "700"})
    heavy = seen._replace(resident=296 * MIB)
    assert room(seen, [seen, heavy]).left == 200 * MIB
    assert room(heavy, [seen, heavy]).most == 496 * MIB


@pytest.mark.parametrize("cores", ["1", "100000"])
def test_memory_is_given_by_a_limit_or_with_a_whole_node(cores: str, node: Node) -> None:
    assert not look(node.root, {"SLURM_CPUS_ON_NODE": "100000"}).given
    assert look(node.root, {"SLURM_MEM_PER_NODE": "700"}).given
    exclusive = {"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": cores}
    assert look(node.root, exclusive).given == (cores == "100000")


def test_every_group_of_version_2_around_the_process_counts(node: Node) -> None:
    node.join(
        "0::/system.slice/job_7/step_0/task_1", V2_MOUNT.format(top="/", mount="/sys/fs/cgroup")
    )
    for path in ("system.slice/job_7/step_0/task_1", "system.slice"):
        node.v2(path, "max", 5 * MIB)
    assert node.left() == 8000
    node.v2("system.slice/job_7", 900 * MIB, 300 * MIB)
    assert node.left() == 600
    node.v2("system.slice/job_7/step_0", 500 * MIB, 100 * MIB)
    assert node.left() == 400
    node.v2("system.slice/job_7", 900 * MIB, 901 * MIB)
    assert node.left() == 0


def test_what_throttles_limits_too_and_cache_is_room(node: Node) -> None:
    node.join("0::/job", V2_MOUNT.format(top="/", mount="/sys/fs/cgroup"))
    node.v2("job", 900 * MIB, 800 * MIB)
    stat = f"anon 1\nfile {500 * MIB}\nshmem {50 * MIB}\ninactive_file {400 * MIB}\n"
    stat += f"active_file {40 * MIB}\nslab_reclaimable {10 * MIB}\nunevictable 0"
    node.write("/sys/fs/cgroup/job/memory.stat", stat)
    assert node.left() == 900 - (800 - 450)
    node.write("/sys/fs/cgroup/job/memory.high", 700 * MIB)
    assert node.left() == 700 - (800 - 450)


def test_every_group_of_version_1_around_the_process_counts(node: Node) -> None:
    groups = "9:name=systemd:/x\n5:cpu,cpuacct:/y\n4:memory:/slurm/uid_0/job_7/step_0/task_0"
    node.join(groups, V1_CPU, V1_MOUNT.format(top="/"))
    node.v1("slurm/uid_0/job_7/step_0/task_0", V1_NONE, 5 * MIB)
    node.v1("slurm", V1_NONE, 5 * MIB)
    node.v1("y", 1, 0)
    assert node.left() == 8000
    node.v1("slurm/uid_0/job_7/step_0", 900 * MIB, 700 * MIB, cache=400 * MIB)
    assert node.left() == 600
    node.v1("slurm/uid_0/job_7", 500 * MIB, 100 * MIB)
    assert node.left() == 400


@pytest.mark.parametrize("counts", [1, 2])
def test_of_a_hybrid_the_version_that_counts_memory_is_found(counts: int, node: Node) -> None:
    v2 = V2_MOUNT.format(top="/", mount="/sys/fs/cgroup/unified")
    node.join("4:memory:/job\n0::/job", V1_CPU, V1_MOUNT.format(top="/"), v2)
    if counts == 1:
        node.v1("job", 500 * MIB, 100 * MIB)
        node.write("/sys/fs/cgroup/unified/job/cgroup.procs", 1)
    else:
        node.v1("job", V1_NONE, 100 * MIB)
        node.v2("job", 500 * MIB, 100 * MIB, mount="/sys/fs/cgroup/unified")
    assert node.left() == 400


@pytest.mark.parametrize(
    ("group", "top", "seen"),
    [
        ("/docker/ab/step", "/docker/ab", "step"),  # its own mount, the host's names
        ("/docker/ab", "/docker/ab", ""),
        ("/", "/", ""),  # names of its own
        ("/../../job", "/", ""),  # a group outside of what it sees
    ],
)
def test_in_a_container_what_is_mounted_counts(group: str, top: str, seen: str, node: Node) -> None:
    node.join(f"0::{group}", V2_MOUNT.format(top=top, mount="/sys/fs/cgroup"))
    node.v2(seen, 500 * MIB, 100 * MIB)
    assert node.left() == 400


def test_ranks_share_the_groups_that_both_are_in(node: Node) -> None:
    """A step's group holds two tasks of 100 MiB each, whose own groups allow more, then less."""
    mount = V2_MOUNT.format(top="/", mount="/sys/fs/cgroup")
    node.v2("step", 900 * MIB, 200 * MIB)

    def tasks(most: int) -> list[Seen]:
        found = []
        for name in ("step/task_0", "step/task_1"):
            node.v2(name, most * MIB, 100 * MIB)
            node.join(f"0::/{name}", mount)
            found.append(look(node.root, {}))
        return found

    both = tasks(700)
    shared = room(both[0], both)
    assert (shared.left, shared.sharing) == (350 * MIB, 2)
    assert shared.limit.name.endswith("/step")
    both = tasks(300)
    own = room(both[1], both)
    assert (own.left, own.sharing) == (200 * MIB, 1)
    assert own.limit.name.endswith("/task_1")


def test_files_that_are_no_files_are_passed_over(node: Node) -> None:
    node.join("0::/job", V2_MOUNT.format(top="/", mount="/sys/fs/cgroup"))
    node.write("/sys/fs/cgroup/job/memory.max", "soon")
    node.write("/sys/fs/cgroup/job/memory.current", "1")
    assert node.left() == 8000
    (node.root / "proc/self/cgroup").unlink()
    assert node.left() == 8000


def test_a_file_on_a_tmpfs_is_in_memory(node: Node) -> None:
    node.join(
        "0::/",
        "23 1 0:2 / / rw - ext4 /dev/sda rw",
        "24 23 0:3 / /dev/shm rw - tmpfs tmpfs rw",
        "25 24 0:4 / /dev/shm/disk rw - xfs /dev/sdb rw",
    )
    found = [in_memory(Path(path), node.root) for path in ("/x", "/dev/shm/y", "/dev/shm/disk/z")]
    assert found == [False, True, False]
