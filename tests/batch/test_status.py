"""What `status` says of shards, of a changed input and of runs that go on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import pytest
from batch_fakes import MIXED, MIXED_ROWS, completion, read_lines, write_lines
from click.testing import CliRunner
from shard_runs import run_part, run_shards

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.claim import Owner
from hpc_distkv.batch.results.side_files import claim_path, side_files
from hpc_distkv.batch.status import SILENT, read_status, read_statuses
from hpc_distkv.cli.group import group
from hpc_distkv.cli.options import results_files
from hpc_distkv.regular import temporary_path


def show(*words: str | Path) -> tuple[int, str]:
    ran = CliRunner().invoke(group, ["status", *map(str, words)])
    return ran.exit_code, ran.output


def claim(output: Path, **fields: float) -> None:
    """As a run on another machine would claim the file."""
    owner = msgspec.structs.replace(Owner.here(), machine="other", host="nid7", job="42", **fields)
    claim_path(output).write_bytes(msgspec.json.encode(owner))


def test_a_row_that_left_the_input_is_named_and_not_left(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(26)])
    run_part(tmp_path / "in", tmp_path / "out")
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(3, 28)])
    found = read_status(tmp_path / "out")
    assert (found.done, found.left, found.gone) == (26, 2, 3)
    code, said = show(tmp_path / "out")
    assert code == 75
    assert "gone    3 of these rows are not in the input any more ('0', '1', '2')\n" in said
    _, said = show("--json", tmp_path / "out")
    assert json.loads(said)["total"]["gone_such_as"] == ["0", "1", "2"]


@pytest.mark.parametrize("shards", [1, 2])
def test_an_input_that_ends_within_a_line_is_not_finished(shards: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(9)])
    outputs = run_shards(tmp_path / "in", shards)
    assert show(*outputs)[0] == 0
    whole = (tmp_path / "in").read_bytes()
    (tmp_path / "in").write_bytes(whole + b'{"custom_id": "9')
    code, said = show(*outputs)
    assert code == 70
    assert said.count("ends within line 10: is it still being copied?") == 1
    assert json.loads(show("--json", *outputs)[1])["total"]["input_torn"]
    (tmp_path / "in").write_bytes(whole + json.dumps(completion("9")).encode())
    code, said = show(*outputs)
    assert code == 75
    assert "ends within" not in said
    outputs[0].unlink()
    (tmp_path / "in").write_bytes(b'{"custom_id": "9')
    run_part(tmp_path / "in", tmp_path / "new")
    assert show(tmp_path / "new")[0] == 70, "its only line, number 0"


def test_shards_are_counted_one_by_one_and_in_sum(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", MIXED)
    outputs = run_shards(tmp_path / "in", 3)
    run_part(tmp_path / "in", tmp_path / "whole")
    whole = read_status(tmp_path / "whole").answered
    statuses = read_statuses(outputs)
    assert [s.left for s in statuses] == [s.gone for s in statuses] == [0, 0, 0]
    assert sum(s.answered.lines for s in statuses) == whole.lines == MIXED_ROWS
    for status, output in zip(statuses, outputs, strict=True):
        assert (
            status.answered.lines == len(read_lines(output)) == read_status(output).answered.lines
        )
    code, said = show(*sorted(tmp_path.glob("out.*")))
    assert code == 1
    total = next(line for line in said.splitlines() if line.startswith("sum of 3"))
    assert total.split()[3:] == ["3", "7", "0", "0"]
    code, said = show("--json", *outputs)
    assert json.loads(said)["total"]["output_tokens"] == whole.output_tokens


def test_what_is_left_of_each_shard_is_found_in_one_pass(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(f"row {i}") for i in range(40)])
    outputs = run_shards(tmp_path / "in", 3)
    outputs[1].unlink()
    run_part(tmp_path / "in", outputs[1], Shard(2, 3), most=4)
    lines = [len(read_lines(output)) for output in outputs]
    statuses = read_statuses(outputs)
    assert [s.left for s in statuses] == [0, 40 - sum(lines), 0]
    code, said = show(*outputs[:2])
    assert code == 75
    assert "shards  3 of 3 are not among these files" in said


def test_a_run_that_goes_on_has_a_rate_and_a_time_left(tmp_path: Path) -> None:
    """Of the rows of this run alone, over its time."""
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(30)])
    run_part(tmp_path / "in", tmp_path / "out", most=12)
    lines = read_lines(tmp_path / "out")
    for line in lines[:2]:
        line["response"]["body"]["created"] -= 10_000
    write_lines(tmp_path / "out", lines)
    assert read_status(tmp_path / "out").rate is None
    claim(tmp_path / "out", since=time.time() - 100)
    found = read_status(tmp_path / "out")
    assert found.rate == pytest.approx(10 / 100, rel=0.1)
    assert found.seconds_left == pytest.approx(18 * 10, rel=0.1)
    _, said = show(tmp_path / "out")
    assert "on nid7, Slurm job 42, for 0:01:4" in said
    assert "rows a minute in this run, 0:0" in said
    long_ago = time.time() - SILENT - 100
    os.utime(claim_path(tmp_path / "out"), (long_ago, long_ago))
    assert read_status(tmp_path / "out").rate is None
    assert "no sign of life for 0:02:4" in show(tmp_path / "out")[1]


def test_a_claim_of_the_version_before_has_no_rate(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    run_part(tmp_path / "in", tmp_path / "out")
    claim(tmp_path / "out")
    path = claim_path(tmp_path / "out")
    old = json.loads(path.read_bytes())
    del old["since"]
    path.write_text(json.dumps(old))
    found = read_status(tmp_path / "out")
    assert found.owner is not None
    assert found.rate is None


def test_files_beside_the_results_are_passed_over(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(3)])
    output = tmp_path / "out"
    run_part(tmp_path / "in", output, most=1)
    beside = [*side_files(output), temporary_path(output), tmp_path / "out.log"]
    for path in beside:
        path.touch()
    code, said = show(*sorted(tmp_path.glob("out*")))
    assert code == 75
    assert said.startswith("done    1\n")
    assert results_files([output.with_name("out.tmp"), *beside]) == [output.with_name("out.tmp")]


@pytest.mark.parametrize("name", [".", "/", "", "..", "folder/.."])
@pytest.mark.parametrize("words", [("status",), ("merge", "out")])
def test_a_directory_is_refused_with_a_sentence(
    name: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(group, [*words, name])
    assert (ran.exit_code, ran.output.count("\n")) == (2, 1)
    assert ran.output.startswith("Error: ")
    assert "director" in ran.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", range(3))
def test_a_pipe_beside_the_results_is_not_waited_for(number: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    run_part(tmp_path / "in", tmp_path / "out")
    beside = side_files(tmp_path / "out")[number]
    beside.unlink(missing_ok=True)
    os.mkfifo(beside)
    if number == 1:
        assert read_status(tmp_path / "out").owner is None, "a claim that cannot be read is none"
    else:
        with pytest.raises(JournalError, match=f"{beside.name}: it is not a regular file"):
            read_status(tmp_path / "out")
