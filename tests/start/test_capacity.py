"""How many rBlocks a rank's pools get."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest
import torch
from local_ranks import open_local, run_local

from hpc_distkv.comm.together import SetupError
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.start import capacity, loading
from hpc_distkv.start.capacity import (
    KvShare,
    device_blocks,
    merged,
    node_room,
    pool_blocks,
    tier_blocks,
)
from hpc_distkv.start.memory_limits import Limit, Room, Seen
from hpc_distkv.start.needs import (
    FOUND_SHARE,
    GIVEN_SHARE,
    Budget,
    Memory,
    largest_step,
    wanted_bytes,
)
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.sizes import LargestStep

MIB = 1 << 20


def cpu_blocks(budget: Budget, options: EngineOptions, block_bytes: int) -> int:
    return budget.pool(wanted_bytes(options, block_bytes), block_bytes) // block_bytes


ROOM = Room(0, MIB, False, Limit("the node", "the node", MIB, MIB), 1)

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
        ({"policy": POLICIES["queue"], "shares": True}, {"shares": True}),
        ({"recorded": True}, {"others": 4, "recorded": True}),
        ({"stages": True}, {"others": 5, "stages": True}),
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
    limits = {"block_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 50}
    wanted = EngineOptions(gpu_memory_utilization=0.9, **limits, **options)
    largest = largest_step(
        wanted, instances=5, **{"policy": POLICIES["lend"], "shares": False} | sizes
    )
    blocks = pool_blocks(rank("cuda"), None, wanted, largest, 10, ROOM)
    assert steps == [LargestStep(**{"tokens": 50, "rows": 3, "block_size": 16} | step)]
    beyond = 10 * (largest.recorded and not options)
    assert blocks == (bytes_for_kv - beyond) // 10


def test_ranks_that_share_a_gpu_are_to_say_what_they_take():
    options = EngineOptions(allow_gpu_sharing=True)
    with pytest.raises(OptionError, match="give --kv-memory or --num-blocks with --allow-gpu"):
        pool_blocks(rank("cuda"), None, options, LargestStep(512, 128, 16), 10, ROOM)


def test_what_a_gpu_copies_from_is_in_no_file():
    with pytest.raises(OptionError, match="--host-kv-path is for ranks on CPUs"):
        tier_blocks(rank("cuda"), 100, "/scratch", 10, ROOM)


# -- on a node ----------------------------------------------------------------------------------


def found(left: int, given: bool = False, sharing: int = 1) -> Room:
    """Room of a rank that has 100 MiB already."""
    limit = Limit("job", "SLURM_MEM_PER_NODE", 8000 * MIB, None)
    return Room(100 * MIB, left, given, limit, sharing)


NEEDS = Memory(60 * MIB, 30 * MIB, 0, 0, 10 * MIB, 20 * MIB)


@pytest.mark.parametrize(("given", "share"), [(True, GIVEN_SHARE), (False, FOUND_SHARE)])
def test_a_pool_takes_a_part_of_what_all_else_leaves(given, share):
    budget = Budget(NEEDS, found(240 * MIB, given))
    assert budget.rest == 200 * MIB
    assert cpu_blocks(budget, EngineOptions(), MIB) == int(share * 200)


def test_weights_that_are_to_be_read_count_as_if_they_were_there():
    heavy = NEEDS._replace(weights=150 * MIB)
    assert Budget(heavy, found(240 * MIB)).rest == 130 * MIB


def test_a_pool_that_is_wanted_may_take_all_that_is_left():
    budget = Budget(NEEDS, found(240 * MIB))
    for options in (EngineOptions(num_blocks=200), EngineOptions(kv_memory=201 * MIB - 1)):
        with_room = Budget(NEEDS, found(241 * MIB))
        assert cpu_blocks(with_room, options, MIB) == 200
    assert cpu_blocks(budget, EngineOptions(kv_memory=MIB), MIB) == 1


@pytest.mark.parametrize(
    "options", [EngineOptions(num_blocks=201), EngineOptions(kv_memory=201 * MIB)]
)
def test_a_pool_that_does_not_fit_is_refused_with_the_sum(options):
    budget = Budget(NEEDS._replace(host=5 * MIB), found(245 * MIB, sharing=4))
    with pytest.raises(OptionError) as refusal:
        cpu_blocks(budget, options, MIB)
    assert str(refusal.value) == (
        "a rank needs weights 60.0 MiB + steps 30.0 MiB + KV cache 201 MiB + --host-kv-memory "
        "5120 KiB + input read ahead 10.0 MiB + program 40.0 MiB = 346 MiB, but "
        "SLURM_MEM_PER_NODE has 8000 MiB, which leaves each of 4 ranks 345 MiB: give --kv-memory "
        "200MiB or --num-blocks 200 at most, or the job more memory"
    )


def test_no_room_for_one_rblock_is_refused_with_what_helps():
    with pytest.raises(OptionError, match=r"leaves it 120 MiB: give the job more memory .*--mem"):
        cpu_blocks(Budget(NEEDS, found(20 * MIB)), EngineOptions(), MIB)
    with pytest.raises(OptionError, match=r"takes 1048576 bytes, but there are 1048575 bytes for"):
        cpu_blocks(Budget(NEEDS, found(240 * MIB)), EngineOptions(kv_memory=MIB - 1), MIB)


def test_all_ranks_of_a_node_have_room_for_what_goes_to_its_memory(monkeypatch):
    room = found(2000 * MIB, sharing=4)
    assert tier_blocks(rank("cpu", 4), 2000 * MIB, None, MIB, room) == 2000
    assert tier_blocks(rank("cpu", 4), 3000 * MIB, "/scratch", MIB, room) == 3000
    with pytest.raises(
        OptionError, match=f"PER_NODE leaves {2000 * MIB} to each of 4 ranks: give less"
    ):
        tier_blocks(rank("cpu", 4), 2000 * MIB + 1, None, MIB, room)
    monkeypatch.setattr(capacity, "in_memory", lambda path: True)
    with pytest.raises(OptionError, match="--host-kv-path on a disk"):
        tier_blocks(rank("cpu", 4), 2000 * MIB + 1, "/dev/shm", MIB, room)


def test_ranks_of_a_node_share_what_they_have_in_common_alone(monkeypatch):
    """Two nodes; on the first one, ranks 0 and 2 in control groups of their own."""
    tasks = [Limit(f"task {n}", "task", 1000 * MIB, 400 * MIB) for n in range(3)]
    node = Limit("the node", "the node", 900 * MIB, 900 * MIB)
    seen = threading.local()
    monkeypatch.setattr(capacity, "look", lambda: Seen(7, True, [tasks[seen.rank], node]))

    def look_around(comm):
        seen.rank = comm.world.rank
        return node_room(comm)

    rooms = run_local(open_local(3, nodes=[0, 1, 0]), look_around)
    assert [(each.left, each.sharing) for each in rooms] == [
        (400 * MIB, 1),
        (400 * MIB, 1),
        (400 * MIB, 1),
    ]
    monkeypatch.setattr(capacity, "look", lambda: Seen(7, True, [node]))
    rooms = run_local(open_local(3, nodes=[0, 1, 0]), look_around)
    assert [(each.left, each.sharing) for each in rooms] == [
        (450 * MIB, 2),
        (900 * MIB, 1),
        (450 * MIB, 2),
    ]


def test_weights_that_have_no_room_are_refused_before_they_are_read(tiny_model, monkeypatch):
    (comm,) = open_local(1)
    config = ModelConfig.from_dir(tiny_model)
    monkeypatch.setattr(capacity, "look", lambda: Seen(0, True, [Limit("a", "a", 9, 9)]))
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("they were read"))
    with pytest.raises(SetupError, match="a rank needs weights"):
        loading.open_model(comm, tiny_model, config, EngineOptions(device="cpu"))


# -- of an instance -----------------------------------------------------------------------------


def test_ranks_of_an_instance_go_by_the_smallest_pool_and_the_dearest_copies():
    ranks = [KvShare(9, 4, 7, 0.1, 3.0), KvShare(8, 5, 6, 0.2, math.inf)]
    assert merged(ranks) == KvShare(8, 4, 6, 0.2, math.inf)
