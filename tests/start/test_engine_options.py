"""Engine options are checked where they are made."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from local_ranks import open_local, run_local

import hpc_distkv
from hpc_distkv import EngineOptions
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.errors import OptionError
from hpc_distkv.start.loading import bind, set_threads

WRONG = [
    ({"num_blocks": "64"}, r"num_blocks must be int \| None, not '64'"),
    ({"num_blocks": 0}, "num_blocks must be at least 1, not 0"),
    ({"num_blocks": 8, "kv_memory": 1 << 30}, "num_blocks and kv_memory"),
    ({"block_size": 16.0}, "block_size must be int, not 16.0"),
    ({"block_size": True}, "block_size must be int, not True"),
    ({"move_budget": -1}, "move_budget must be at least 0"),
    ({"enforce_eager": 1}, "enforce_eager must be bool"),
    ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization must be in"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in"),
    ({"threads": 3_000_000_000}, "threads must be at most 1024"),
    ({"dtype": "int8"}, "dtype must be one of auto, float32.*not 'int8'"),
    ({"policy": "share"}, "policy must be one of lend, .*not 'share'"),
    ({"policy": None}, "policy must be "),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_values_are_refused_by_name(options, said):
    with pytest.raises(OptionError, match=said):
        EngineOptions(**options)


def test_right_values_are_taken():
    given = {
        "gpu_memory_utilization": 1,
        "policy": POLICIES["queue"],
        "lend_cap": 0,
        "kv_memory": 1,
    }
    options = EngineOptions(**given)
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize("options", [{"transport": "nccl"}, {"allow_gpu_sharing": True}])
def test_what_only_gpus_have_is_refused_on_cpus(options):
    def rank(comm):
        with pytest.raises(OptionError, match="cannot be: it needs GPUs"):
            bind(comm, EngineOptions(device="cpu", **options))

    run_local(open_local(1), rank)


@pytest.mark.parametrize(
    ("cores", "threads", "taken"), [(3.7, None, 3), (0.5, None, 1), (3.7, 2, 2)]
)
def test_torch_gets_the_ranks_share_of_the_cores_unless_told_otherwise(
    cores, threads, taken, monkeypatch
):
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    set_threads(SimpleNamespace(world=SimpleNamespace(cores=cores)), threads)
    assert told == [taken]


def test_the_package_shows_its_public_names_alone():
    assert sorted(dir(hpc_distkv)) == ["Engine", "EngineOptions", "Files"]
