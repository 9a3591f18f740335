"""Every benchmark is one command that writes its figures and plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from batch_job import run_command
from click.testing import CliRunner
from mpirun import mpirun

from hpc_distkv.cli.group import group
from hpc_distkv.simulate import paper as published

RANKS = 2 if mpirun() else 0
SMALL = """
description = "A few rows"
seed = 1
[classes.short]
prompt = 6
output = 4
[classes.long]
prompt = 60
output = 8
[traces]
few = { short = 4, long = 1 }
"""


@pytest.fixture
def trace(tmp_path: Path) -> str:
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return f"{file}#few"


def policies(
    tiny_model: Path, trace: str, folder: Path, against: str, *others: str, ranks: int = RANKS
):
    model = ("--model", str(tiny_model), "--dtype", "float32", "--num-blocks", "6")
    rows = ("--trace", trace, "--rows", "10", "--block-size", "16", "--against", against)
    return run_command(ranks, "bench", "policies", *model, *rows, "-o", str(folder), *others)


def test_policies_side_by_side(tiny_model, trace, tmp_path):
    ways = "lend,budget-0,no-dgfm,no-planner,lend-greedy,migrate,tensor-parallel,queue,isolated"
    done = policies(tiny_model, trace, tmp_path / "out", ways)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "policies.json").read_text())
    assert figures["traces"] == json.loads(done.stdout)["traces"]
    (result,) = figures["traces"].values()
    assert result["rows"] == 10
    for way in ways.split(","):
        assert result["figures"][way]["output_tokens"] == 8 * 4 + 2 * 8
        assert result["over_isolated"][way]["median"] > 0
        assert result["predicted_over_measured"][way] > 0
    drawn = {file.name for file in (tmp_path / "out").glob("*.svg")}
    assert drawn == {
        "throughput.svg",
        "between-tokens-p50.svg",
        "between-tokens-p99.svg",
        "remote-share.svg",
    }


@pytest.mark.parametrize(
    ("against", "said"),
    [("lend,swap", "there is no way 'swap'"), ("budget-many", "there is no way 'budget-many'")],
)
def test_a_way_that_is_none_is_named(tiny_model, trace, tmp_path, against, said):
    done = policies(tiny_model, trace, tmp_path / "out", against, ranks=0)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_prefix(tiny_model):
    model = ("--model", str(tiny_model), "--dtype", "float32", "--num-blocks", "60")
    rows = ("--document-len", "40", "--question-len", "5", "--rows", "6", "--output-len", "3")
    done = run_command(RANKS, "bench", "prefix", *model, *rows, "--block-size", "8")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["prompt_tokens"] == figures["computed_prompt_tokens"]["apart"] == 6 * 45
    assert figures["distinct_prompt_tokens"] == 40 + 6 * 5
    assert 40 + 6 * 5 <= figures["computed_prompt_tokens"]["shared"] <= max(1, RANKS) * 40 + 6 * 5
    assert figures["apart_over_shared_time"]["median"] > 0


def test_rows_that_are_too_long_for_a_way_are_refused_with_the_arithmetic(
    tiny_model, trace, tmp_path
):
    done = policies(tiny_model, trace, tmp_path, "lend,isolated", "--limits", "9", ranks=0)
    assert done.returncode == 2
    assert "the KV of 131 tokens, and lend has room for 96" in done.stderr
    assert "Traceback" not in done.stderr


def test_outputs_that_are_not_known_beforehand(tiny_model, trace, tmp_path):
    done = policies(tiny_model, trace, tmp_path, "lend,isolated", "--limits", "4", ranks=0)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["traces"].values()
    made = result["figures"]["isolated"]["output_tokens"]
    assert result["figures"]["lend"]["output_tokens"] == made == result["output_tokens"]
    assert 10 <= made <= 4 * (8 * 4 + 2 * 8)


def test_rounds(tmp_path):
    done = run_command(
        0, "bench", "rounds", "--instances", "8", "--instances", "40", "--rounds", "9"
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)
    assert [point["instances"] for point in points] == [8, 40]
    assert all(0 < point["median_ms"] <= point["max_ms"] for point in points)


@pytest.mark.parametrize(("noise", "some"), [("0", False), ("0.3", True)])
def test_draws(tiny_model, noise, some):
    options = ("--model", str(tiny_model), "--rows", "20", "--draws", "400", "--noise", noise)
    ran = CliRunner().invoke(group, ["bench", "draws", *options])
    assert ran.exit_code == 0, ran.output
    figures = json.loads(ran.stdout)
    for case in ("temperature 1", "temperature 0.7, top-p 0.9", "temperature 1, top-k 40"):
        assert figures[case]["draws"] == 400
        assert (figures[case]["race"] > 0) == (figures[case]["cumulative"] > 0) == some


def test_host():
    options = ("--input-len", "40", "--output-len", "40", "--step-ms", "8")
    done = run_command(0, "bench", "host", "--rows", "4", "--rows", "8", *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [figure["rows"] for figure in figures] == [4, 8]
    for figure in figures:
        assert figure["host_microseconds"] > 0
        assert figure["step_milliseconds"] > 6, "the device is the bottleneck"


def test_scale(tmp_path):
    done = run_command(
        0,
        "bench",
        "scale",
        "--gpus",
        "8",
        "--gpus",
        "16",
        "--rows-per-gpu",
        "2",
        "-o",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "scale.json").read_text())["points"]
    assert [point["rows"]["answered"] for point in points] == [16, 32]
    assert all(point["tokens_per_second_per_gpu"] > 0 for point in points)
    assert {file.name for file in tmp_path.glob("*.svg")} == {
        "scale-throughput.svg",
        "scale-round.svg",
    }


def test_paper(tmp_path):
    for name in ("mixes", "short", "long"):
        (tmp_path / f"{name}.toml").write_text(SMALL)
    folder = tmp_path / "out"
    done = run_command(0, "bench", "paper", "--traces", tmp_path, "--rows", "5", "-o", folder)
    assert done.returncode == 0, done.stderr
    tables = json.loads((folder / "paper.json").read_text())
    assert list(tables) == ["context_length", "mixes", "short", "long"]
    for name, table in tables.items():
        assert table["published"]
        assert table["differences"]
        (result,) = table["simulated"].values()
        assert result["over_node"] > 1 if name == "context_length" else result["lend_over"]
    assert {file.name for file in folder.glob("*.svg")} == {
        f"paper-{name}.svg" for name in ("context", "mixes", "short", "long")
    }


@pytest.mark.parametrize("arguments", [["paper", "--rows", "5"], ["scale", "--gpus", "8"]])
def test_where_plots_go_is_looked_at_before_the_run(arguments, tmp_path, monkeypatch):
    def run(*_: object) -> None:
        raise AssertionError("it ran")

    (tmp_path / "file").touch()
    folder = tmp_path / "file/folder"
    for name in ("tables", "scale"):
        monkeypatch.setattr(published, name, run)
    ran = CliRunner().invoke(group, ["bench", *arguments, "-o", str(folder)])
    assert ran.exit_code == 2
    assert "Error: " in ran.output
    assert "folder" in ran.output


def test_where_plots_of_policies_go_is_looked_at_before_the_run(tiny_model, trace, tmp_path):
    (tmp_path / "file").touch()
    done = policies(tiny_model, trace, tmp_path / "file" / "folder", "lend,isolated")
    assert done.returncode == 2
    assert done.stderr.count("cannot write to the folder") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["throughput"], ["remote", "--context", "20"], ["unused-lending"], ["prefix"]]
)
def test_options_that_cannot_be_are_said_once_with_status_2(arguments, tiny_model, tmp_path):
    model = ("--model", str(tiny_model), "--host-kv-path", str(tmp_path))
    done = run_command(2 if arguments[0] == "remote" else 0, "bench", *arguments, *model)
    assert done.returncode == 2
    assert done.stderr.count("--host-kv-memory") == 1
    assert "Traceback" not in done.stderr


def test_kernels():
    small = ("--length", "64", "--length", "500", "--batch", "2", "--most-tokens", "512")
    done = run_command(0, "bench", "kernels", "--device", "cpu", *small)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    (decode,) = figures["decode"]
    assert (decode["batch"], decode["tokens"], figures["prompt"]) == (2, 64, [])
    assert decode["out_error"] < 1e-2


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_kernels_of_a_device_that_is_not_there(device):
    done = run_command(0, "bench", "kernels", "--device", device)
    assert done.returncode == 2
    assert device in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_is_not_there_is_not_profiled(tiny_model):
    options = ("--model", str(tiny_model), "--device", "cpu", "--num-blocks", "10")
    done = run_command(0, "bench", "gpu", *options)
    assert done.returncode == 2
    assert "run it on a node that has one" in done.stderr
    assert "Traceback" not in done.stderr
