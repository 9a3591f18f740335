"""How a model is cut for a cluster, and what a row may have there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.cluster import ELSEWHERE, NODE, SWITCH, Cluster, DeviceSpec, Measured
from hpc_distkv.simulate.deployment import Deployment, usable_tp
from hpc_distkv.simulate.models import MODELS
from hpc_distkv.simulate.workload import TraceRow

A100 = Cluster.load(Path(__file__).parents[2] / "jobs" / "clusters" / "a100-4x8.toml")
LLAMA, BIG = MODELS["llama2-7b"], MODELS["llama2-70b"]


def config(policy: str = "lend", **sizes: int) -> EngineConfig:
    return EngineConfig(1, policy=POLICIES[policy], **{"block_size": 256, **sizes})


def test_the_pool_is_what_weights_and_activations_leave():
    """85 GB · 0.9 − 2 GB − 2 · 6.738e9 parameters, over 256 · 524,288 bytes."""
    where = Deployment.fit(A100, LLAMA, config())
    assert (where.tp, where.instances, where.gpus) == (1, 32, 32)
    assert where.config.num_blocks == int((85e9 * 0.9 - 2e9 - 13.477e9) // (256 * 524_288))


def test_a_model_too_large_for_one_gpu_takes_as_few_as_hold_it():
    """70B are 138 GB in bfloat16: two A100 hold them."""
    where = Deployment.fit(A100, BIG, config())
    assert (where.tp, where.instances, where.gpus) == (2, 16, 32)
    assert Deployment.fit(A100, BIG, config(), tp=8).instances == 4


def test_usable_sizes_divide_heads_and_nodes():
    assert usable_tp(A100, LLAMA, 256) == [1, 2, 4, 8, 16, 32]
    assert usable_tp(A100, BIG, 256) == [2, 4, 8, 16, 32]
    three = Cluster(
        nodes=3, gpus_per_node=8, device=A100.device, roofline=A100.roofline, links=A100.links
    )
    assert usable_tp(three, LLAMA, 256) == [1, 2, 4, 8, 16]


def test_a_model_that_fits_nowhere_is_refused_with_the_arithmetic():
    speed = Measured(1, 1, 1, 1, 1, 1, 1)
    small = Cluster(nodes=1, gpus_per_node=2, device=DeviceSpec("toy", 10e9, 0), measured=speed)
    with pytest.raises(OptionError, match="does not fit on toy"):
        Deployment.fit(small, BIG, config())


@pytest.mark.parametrize(
    ("policy", "cap", "blocks"),
    [
        ("lend", None, 32 * 454),
        ("lend-greedy", 100, 454 + 31 * 100),
        ("lend", 1000, 32 * 454),
        ("migrate", None, 454),
        ("queue", None, 454),
        ("isolated", None, 454),
    ],
)
def test_a_row_may_have_its_pool_and_what_others_lend(policy, cap, blocks):
    where = Deployment.fit(A100, LLAMA, config(policy, lend_cap=cap))
    assert where.capacity_tokens == 256 * blocks
    assert where.fits(TraceRow(256 * blocks - 9, 10))
    assert not where.fits(TraceRow(256 * blocks - 8, 10))


def test_a_lone_instance_shares_nothing():
    where = Deployment.fit(A100, LLAMA, config("lend"), tp=32)
    assert not where.config.policy.sharing
    assert where.config.policy == POLICIES["queue"]


def test_link_classes_are_levels_of_distance():
    where = Deployment.fit(A100, LLAMA, config(), tp=4)
    links = where.links()
    assert [links.between(0, other) for other in (1, 2, 7)] == [NODE, SWITCH, SWITCH]
    far = Cluster(
        nodes=2, gpus_per_node=1, device=A100.device, roofline=A100.roofline, links=A100.links
    )
    assert Deployment.fit(far, LLAMA, config()).links().between(0, 1) == ELSEWHERE


# -- the host's memory --------------------------------------------------------------------------


def test_the_hosts_memory_counts_by_rank_and_for_one_row():
    """On 8 ranks an rBlock of 256 tokens takes 256 · 40,960 bytes on each: 10 GB hold 953; at
    25.2 GB/s it is there and back in 0.83 ms. 16 rows compute 16 · 2,621,440 / 8 FLOPs a token at
    0.69 TFLOP/s, so one takes 0.475 us, and a copy 1.625 us."""
    where = Deployment.fit(A100, BIG, config(), 8, 10 * 10**9)
    without = Deployment.fit(A100, BIG, config(), 8)
    assert where.config.host_blocks == 953
    assert where.config.host_copy_seconds == pytest.approx(2 * 256 * 40_960 / 25.2e9)
    assert where.config.host_staged_from == pytest.approx(1.6254 / 0.4749, rel=1e-3)
    assert where.capacity_tokens == without.capacity_tokens + 953 * 256
    assert where.config.num_blocks == without.config.num_blocks
    assert (without.config.host_blocks, without.config.host_staged_from) == (0, math.inf)


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (100, "one rBlock takes 134217728 bytes, but --host-kv-memory gives 100: give more"),
        (10**12, "gives 1000 GB to each of 8 ranks of a node, which has 2000 GB: give less"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_reason(memory, said):
    with pytest.raises(OptionError, match=said):
        Deployment.fit(A100, LLAMA, config(), host_memory=memory)


def test_a_cluster_that_says_nothing_of_its_hosts_has_none():
    silent = Cluster(
        nodes=4, gpus_per_node=8, device=A100.device, roofline=A100.roofline, links=A100.links
    )
    with pytest.raises(OptionError, match="says nothing of its hosts: add the table `host`"):
        Deployment.fit(silent, LLAMA, config(), host_memory=10**10)
