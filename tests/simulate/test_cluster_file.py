"""What a cluster file may say, and what it is told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.cluster import ELSEWHERE, NODE, SWITCH, Cluster
from hpc_distkv.simulate.models import MODELS

SHIPPED = Path(__file__).parents[2] / "jobs" / "clusters"

MEASURED = """
nodes = 2
gpus_per_node = 2

[device]
name = "CPU"
memory = 4e9
activation_reserve = 0

[measured]
fixed = 20e-3
per_token = 1e-3
prefill_per_token = 0.5e-3
per_kv_token = 2e-6
per_pair = 1e-7
exchange = 50e-6
bytes_per_second = 2e9
"""

HOST = """
[host]
memory = 1e12
bandwidth = 50e9
flops = 1e12
read_efficiency = 0.8
compute_efficiency = 0.5
bus = { latency = 1e-5, bandwidth = 32e9, efficiency = 0.8 }

"""


def load(path: Path, text: str) -> Cluster:
    (path / "cluster.toml").write_text(text)
    return Cluster.load(path / "cluster.toml")


@pytest.mark.parametrize(
    ("name", "gpus"), [("a100-4x8", 32), ("h100-8x8", 64), ("h100-10000", 10_000)]
)
def test_every_model_has_room_on_the_shipped_clusters(name: str, gpus: int) -> None:
    cluster = Cluster.load(SHIPPED / f"{name}.toml")
    assert cluster.instances(1) == gpus
    assert cluster.host is not None
    for model, tp in (
        ("llama2-7b", 1),
        ("llama2-13b", 2),
        ("llama2-70b", 4),
        ("llama3-70b", 8),
        ("smollm2-135m", 1),
    ):
        tokens = 32 * cluster.kv_blocks(MODELS[model], tp, 32)
        assert tokens > 100_000
        assert cluster.instances(tp) == gpus // tp


def test_no_other_cluster_is_shipped_untested() -> None:
    names = {path.stem for path in SHIPPED.glob("*.toml")}
    assert names >= {"a100-4x8", "h100-8x8", "h100-10000"}
    for name in names:
        Cluster.load(SHIPPED / f"{name}.toml")


def test_blocks_are_what_weights_and_reserve_leave() -> None:
    """By hand: 0.9 · 85 GB − 13.476 GB − 2 GB = 61.024 GB, and 32 tokens take 16.777 MB."""
    cluster = Cluster.load(SHIPPED / "a100-4x8.toml")
    assert cluster.kv_blocks(MODELS["llama2-7b"], 1, 32) == int(61.0237e9 / 16.777216e6)


def test_copied_kv_heads_give_no_more_room_than_the_weights_they_save() -> None:
    """llama2-70b has 8 KV heads: on 32 ranks each holds one, a token takes 40 KiB as on 8."""
    cluster = Cluster.load(SHIPPED / "a100-4x8.toml")
    for tp in (8, 32):
        free = 76.5e9 - 137.95065856e9 / tp - 2e9
        assert cluster.kv_blocks(MODELS["llama2-70b"], tp, 16) == int(free / (40_960 * 16))


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    cluster = Cluster.load(SHIPPED / "a100-4x8.toml")
    with pytest.raises(OptionError, match=r"85 GB × 0\.9 usable − 138 GB weights − 2 GB.*raise"):
        cluster.kv_blocks(MODELS["llama2-70b"], 1, 32)


def test_places_follow_nodes_and_switches() -> None:
    cluster = Cluster.load(SHIPPED / "h100-10000.toml")
    assert [cluster.node_of(i, 4) for i in (0, 1, 2, 63, 64)] == [0, 0, 1, 31, 32]
    assert [cluster.switch_of(i, 4) for i in (0, 63, 64, 2499)] == [0, 0, 1, 39]


def test_instances_may_span_whole_nodes() -> None:
    cluster = Cluster.load(SHIPPED / "h100-10000.toml")
    assert cluster.instances(16) == 625
    assert [cluster.node_of(i, 16) for i in (0, 1, 16)] == [0, 2, 32]
    assert [cluster.switch_of(i, 16) for i in (0, 1, 16)] == [0, 0, 1]
    within = [cluster.level_within(tp) for tp in (1, 8, 16, 256, 512)]
    assert within == [NODE, NODE, SWITCH, SWITCH, ELSEWHERE]
    small = Cluster.load(SHIPPED / "a100-4x8.toml")
    assert small.level_within(32) == SWITCH


@pytest.mark.parametrize("tp", [0, 3, 12, 40])
def test_instances_that_cut_nodes_are_refused(tp: int) -> None:
    with pytest.raises(OptionError, match=f"size {tp} does not fit 4 nodes of 8"):
        Cluster.load(SHIPPED / "a100-4x8.toml").instances(tp)


def test_a_measured_cluster_needs_no_roofline(tmp_path: Path) -> None:
    cluster = load(tmp_path, MEASURED)
    assert cluster.measured is not None
    assert cluster.measured.exchange == 50e-6
    assert cluster.instances(1) == 4
    assert cluster.kv_blocks(MODELS["smollm2-135m"], 1, 32) == int(
        (3.6e9 - 268_959_744) / (23_040 * 32)
    )


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("nodes = 2\n", "", "nodes"),
        ("nodes = 2\n", "nodes = 0\n", r"\$\.nodes"),
        ("nodes = 2\n", "nodes = 2.5\n", r"\$\.nodes"),
        ("nodes = 2\n", 'nodes = "two"\n', r"\$\.nodes"),
        ("nodes = 2\n", "nodes = 2\nnods = 3\n", "nods"),
        ("nodes = 2\n", "nodes = 2\ngpu_memory_utilization = 1.2\n", "gpu_memory_utilization"),
        ("memory = 4e9", "memory = nan", r"\$\.device\.memory"),
        ("memory = 4e9", "memory = inf", r"\$\.device\.memory"),
        ("memory = 4e9\n", "", "memory"),
        ("per_pair = 1e-7", "per_pair = -1e-7", r"\$\.measured\.per_pair"),
        ("exchange = 50e-6", "exchanges = 50e-6", "exchange"),
        ("[measured]", "[roofline]", r"\$\.roofline"),
        (MEASURED[MEASURED.index("[measured]") :], "", "measured.*roofline"),
        (
            "[measured]",
            "[links]\nnode = { latency = 1, bandwidth = 1, efficiency = 2 }\n[measured]",
            r"\$\.links\.node\.efficiency",
        ),
        ("[measured]", "[host]\nmemory = 1e12\n[measured]", r"\$\.host"),
        ("[measured]", HOST + "[measured]", "`host` goes with `roofline`, not with `measured`"),
        ("[measured]", HOST.replace("bus", "link") + "[measured]", "link"),
        ("nodes = 2", "nodes = ", "cluster.toml"),
    ],
)
def test_bad_files_are_told_which_key(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in MEASURED
    with pytest.raises(OptionError, match=named):
        load(tmp_path, MEASURED.replace(old, new))


def test_roofline_and_measured_exclude_each_other(tmp_path: Path) -> None:
    shipped = (SHIPPED / "a100-4x8.toml").read_text()
    with pytest.raises(OptionError, match="either `measured`, or `roofline`"):
        load(tmp_path, shipped + MEASURED[MEASURED.index("[measured]") :])
    with pytest.raises(OptionError, match="`roofline` and `links` belong together"):
        load(tmp_path, shipped[: shipped.index("[links.node]")])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"absent\.toml cannot be read"):
        Cluster.load(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=r"binary\.toml"):
        Cluster.load(tmp_path / "binary.toml")
