"""`hpc-distkv simulate` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpc_distkv.cli.group import group

CLUSTER = """
nodes = 2
gpus_per_node = 2
nodes_per_switch = 2
device = { name = "toy", memory = 16e9, activation_reserve = 0 }

[roofline]
flops = 100e12
bandwidth = 1000e9
step_overhead = 1e-3
layer_overhead = 1e-5
matmul_efficiency = 0.5
weight_efficiency = 0.8
prefill_efficiency = 0.5
decode_efficiency = 0.7

[links]
node = { latency = 1e-6, bandwidth = 100e9, efficiency = 0.8 }
switch = { latency = 1e-5, bandwidth = 10e9, efficiency = 0.8 }
elsewhere = { latency = 1e-5, bandwidth = 10e9, efficiency = 0.8 }
"""
HOST = """
[host]
memory = 64e9
bandwidth = 50e9
flops = 1e12
read_efficiency = 0.8
compute_efficiency = 0.5
bus = { latency = 1e-5, bandwidth = 32e9, efficiency = 0.8 }
"""
TRACE = """
description = "A few rows"
seed = 1
rows = 12

[classes.short]
prompt = 100
output = 20

[classes.long]
long = true
prompt = 3_000
output = 10

[traces]
short = { short = 100 }
both = { short = 75, long = 25 }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cluster on which llama2-7b leaves room for 1,767 tokens a GPU."""
    (tmp_path / "cluster.toml").write_text(CLUSTER + HOST)
    (tmp_path / "trace.toml").write_text(TRACE)
    return tmp_path


def simulate(folder: Path, *options: str, trace: str = "both") -> Result:
    words = [str(folder / "cluster.toml"), "--model", "llama2-7b", "--block-size", "16"]
    words += ["--trace", f"{folder / 'trace.toml'}#{trace}", *options]
    return CliRunner().invoke(group, ["simulate", *words])


def figures(folder: Path, *options: str, trace: str = "both") -> dict[str, Any]:
    output = folder / "figures.json"
    done = simulate(folder, *options, "-o", str(output), trace=trace)
    assert done.exit_code == 0, done.output
    read: dict[str, Any] = json.loads(output.read_text())
    return read


def test_it_prints_the_figures_and_writes_all_of_them(folder):
    done = simulate(folder)
    assert done.exit_code == 0, done.output
    assert "4 instances of 1 toy" in done.output
    assert "12 answered, 0 too long" in done.output
    told = figures(folder)
    assert told["options"]["policy"] == "lend"
    assert told["trace"]["rows"] == told["rows"]["answered"] == 12
    assert told["output_tokens"] == 9 * 20 + 3 * 10
    assert told["prompt_tokens"] == 9 * 100 + 3 * 3000
    assert told["output_tokens_per_second"] == pytest.approx(210 / told["seconds"])
    assert told["counters"]["blocks_lent"] > 0


def test_rows_that_never_fit_are_refused(folder):
    assert figures(folder, "--policy", "queue")["rows"] == {"answered": 9, "refused": 3}


def test_tensor_parallel_takes_all_gpus_for_one_instance(folder):
    told = figures(folder, "--policy", "tensor-parallel")
    assert (told["instances"], told["tensor_parallel_size"]) == (1, 4)
    assert told["rows"]["refused"] == 0
    assert told["counters"]["blocks_lent"] == 0
    assert figures(folder, "--tp", "2")["instances"] == 2


def test_rows_and_scale_change_the_trace(folder):
    told = figures(folder, "--rows", "8", "--scale", "10", "--scale-output", "2")
    assert told["prompt_tokens"] == 6 * 10 + 2 * 300
    assert told["output_tokens"] == 6 * 10 + 2 * 5


def test_lending_can_be_told_not_to_bring_anything_home(folder):
    lent = figures(folder, "--no-dgfm", "--no-planner", "--rows", "40")
    assert lent["rows"]["answered"] == 40
    assert lent["counters"]["blocks_lent"] > 0
    assert lent["counters"]["blocks_returned"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "no-such-model"], "neither a model directory nor one of"),
        (["--tp", "3"], "tensor parallel size 3"),
        (["--rows", "0"], "--rows"),
        (["--scale", "0"], "cannot be divided by 0"),
        (["--trace", "missing.toml#a"], "missing.toml"),
        (["--policy", "share"], "--policy"),
        (["--host-kv-memory", "much"], "'much' is no size: write for example 4GiB"),
        (["--host-kv-memory", "1MiB"], "one rBlock takes 8388608 bytes"),
        (["--host-kv-memory", "40GB"], "40 GB to each of 2 ranks of a node, which has 64 GB"),
        (["-o", "no/such/folder/out.json"], "no/such/folder"),
    ],
)
def test_wrong_options_are_a_sentence_and_status_2(folder, options, said):
    done = simulate(folder, *options)
    assert done.exit_code == 2
    assert said in done.output


def test_a_cluster_without_hosts_is_told_what_is_missing(folder):
    (folder / "cluster.toml").write_text(CLUSTER)
    done = simulate(folder, "--host-kv-memory", "1GiB")
    assert done.exit_code == 2
    assert "add the table `host`" in done.output.replace("\n", " ")


def test_a_wrong_cluster_file_is_named(folder):
    (folder / "cluster.toml").write_text(CLUSTER.replace("nodes = 2", "nodes = 0", 1))
    done = simulate(folder)
    assert done.exit_code == 2
    assert "cluster.toml" in done.output
    assert "nodes" in done.output


def test_the_hosts_memory_takes_rows_that_no_pool_can(folder):
    """1 GiB are 128 rBlocks beside the 110 of a pool."""
    told = figures(folder, "--policy", "queue", "--host-kv-memory", "1GiB")
    assert told["rows"] == {"answered": 12, "refused": 0}
    assert told["host_blocks"] == 128
    counters = told["counters"]
    assert 0 < counters["peak_host"] <= 128
    assert counters["blocks_to_host"] >= counters["peak_host"]
    assert counters["host_time"] > 0
    done = simulate(folder, "--policy", "queue", "--host-kv-memory", "1GiB")
    assert f"host       {counters['blocks_to_host']} rBlocks to its memory" in done.output
    assert "of 128 there at once by one instance" in done.output
    assert "\nhost " not in simulate(folder).output
