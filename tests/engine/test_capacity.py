"""How many rBlocks a rank's pools get."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hpc_distkv.control.policy import POLICIES
from hpc_distkv.engine import capacity
from hpc_distkv.engine.capacity import (
    KV_SHARE,
    KvShare,
    available_memory,
    cpu_blocks,
    device_blocks,
    merged,
    pool_blocks,
    tier_blocks,
)
from hpc_distkv.engine.config import EngineConfig, OptionError
from hpc_distkv.engine.largest_step import LargestStep
from hpc_distkv.engine.options import EngineOptions

MIB = 1 << 20

# -- on a GPU -----------------------------------------------------------------------------------


def test_the_pool_gets_its_part_of_what_is_free_less_what_steps_take():
    assert device_blocks(1000, 100, 0.9, None, block_bytes=10, tokens=8) == 80


def test_a_pool_of_a_given_size_may_take_all_that_steps_leave():
    assert device_blocks(1000, 100, 0.9, 900, block_bytes=10, tokens=8) == 90


def test_a_pool_that_would_leave_no_room_for_steps_is_refused():
    with pytest.raises(OptionError, match=r"is to have 901 bytes.* 100 are for steps of 8 tokens"):
        device_blocks(1000, 100, 0.9, 901, block_bytes=10, tokens=8)


def test_no_room_for_one_block_is_refused_with_the_sums():
    with pytest.raises(OptionError, match=r"takes 50 bytes, but of 0.5 of the 1000 .* 480 are"):
        device_blocks(1000, 480, 0.5, None, block_bytes=50, tokens=8)


def rank(device: str, local_size: int = 1) -> SimpleNamespace:
    """Of five instances."""
    return SimpleNamespace(
        device=SimpleNamespace(place=torch.device(device)),
        world=SimpleNamespace(local_size=local_size, instances=5),
    )


@pytest.mark.parametrize(
    ("sizes", "step"),
    [
        ({}, {"others": 4}),
        ({"policy": POLICIES["queue"], "enable_prefix_caching": True}, {"shares": True}),
        ({"cuda_graphs": True}, {"others": 4, "recorded": True}),
        ({"host_blocks": 9}, {"others": 5, "stages": True}),
    ],
)
@pytest.mark.parametrize(
    ("options", "bytes_for_kv"), [({}, 700), ({"num_blocks": 8}, 80), ({"kv_memory": 333}, 333)]
)
def test_what_the_largest_step_takes_is_not_in_the_pool(
    sizes, step, options, bytes_for_kv, monkeypatch
):
    steps = []
    monkeypatch.setattr(capacity, "activation_peak", lambda *asked: steps.append(asked[2]) or 200)
    monkeypatch.setattr(capacity, "free_memory", lambda device: 1000)
    config = EngineConfig(1, 16, max_num_seqs=3, max_num_batched_tokens=50, **sizes)
    blocks = pool_blocks(
        rank("cuda"), None, EngineOptions(gpu_memory_utilization=0.9, **options), config, 10
    )
    assert steps == [LargestStep(**{"tokens": 50, "rows": 3, "block_size": 16} | step)]
    beyond = 10 * (config.cuda_graphs and not options)
    assert blocks == (bytes_for_kv - beyond) // 10


def test_ranks_that_share_a_gpu_are_to_say_what_they_take():
    options = EngineOptions(allow_gpu_sharing=True)
    with pytest.raises(OptionError, match="give --kv-memory or --num-blocks with --allow-gpu"):
        pool_blocks(rank("cuda"), None, options, EngineConfig(1, 16), 10)


def test_what_a_gpu_copies_from_is_in_no_file():
    with pytest.raises(OptionError, match="--host-kv-path is for ranks on CPUs"):
        tier_blocks(rank("cuda"), 100, "/scratch", 10)


# -- on a node ----------------------------------------------------------------------------------


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a node that has 8000 MiB available: path → text."""
    files = {"/proc/meminfo": "MemTotal: 16384000 kB\nMemAvailable: 8192000 kB\nHugetlb: 0 kB"}

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return files


@pytest.mark.parametrize(
    ("slurm", "mib"),
    [
        ({}, 8000),
        ({"SLURM_MEM_PER_NODE": "0"}, 8000),  # all there is
        ({"SLURM_MEM_PER_NODE": "700"}, 700),
        ({"SLURM_MEM_PER_NODE": "9000"}, 8000),
        ({"SLURM_MEM_PER_CPU": "100"}, 100),
        ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}, 400),
    ],
)
def test_slurm_may_allow_less_than_there_is(slurm, mib, node, monkeypatch):
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert available_memory() == mib * MIB


def test_every_control_group_around_the_process_may_allow_less_than_there_is(node):
    node["/proc/self/cgroup"] = "1:name=systemd:/old\n0::/job/step\n"
    assert available_memory() == 8000 * MIB
    for group, most, used in (("job/step", "max", "5"), ("job", "900", "300"), ("old", "1", "0")):
        node[f"/sys/fs/cgroup/{group}/memory.max"] = f"{most}\n"
        node[f"/sys/fs/cgroup/{group}/memory.current"] = f"{used}\n"
    assert available_memory() == 600
    node["/sys/fs/cgroup/job/memory.current"] = "901\n"
    assert available_memory() == 0


def test_the_ranks_of_a_node_share_a_part_of_what_it_has(node):
    assert cpu_blocks(rank("cpu", 4), None, MIB) == int(KV_SHARE * 2000)
    assert cpu_blocks(rank("cpu", 4), 10 * MIB - 1, MIB) == 9
    assert cpu_blocks(rank("cpu", 4), MIB, MIB) == 1
    with pytest.raises(OptionError, match=r"takes 1048576 bytes, but there are 1048575 bytes for"):
        cpu_blocks(rank("cpu", 4), MIB - 1, MIB)


def test_all_ranks_of_a_node_have_room_for_what_goes_to_its_memory(node):
    assert tier_blocks(rank("cpu", 4), 2000 * MIB, None, MIB) == 2000
    assert tier_blocks(rank("cpu", 4), 3000 * MIB, "/scratch", MIB) == 3000
    with pytest.raises(OptionError, match="to each of 4 ranks on this node"):
        tier_blocks(rank("cpu", 4), 2000 * MIB + 1, None, MIB)


# -- of an instance -----------------------------------------------------------------------------


def test_ranks_of_an_instance_go_by_the_smallest_pool_and_the_dearest_copies():
    ranks = [KvShare(9, 4, 7, 0.1, 3.0), KvShare(8, 5, 6, 0.2, math.inf)]
    assert merged(ranks) == KvShare(8, 4, 6, 0.2, math.inf)
