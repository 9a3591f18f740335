"""Shards that are merged are the job without shards, row by row; what is wrong is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from batch_fakes import MIXED, MIXED_ROWS, completion, read_lines, write_lines
from click.testing import CliRunner
from shard_runs import run_part, run_shards

from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.merge import merge
from hpc_distkv.batch.results.side_files import unfinished_path
from hpc_distkv.cli.group import group


def run_merge(*words: str | Path) -> tuple[int, str]:
    ran = CliRunner().invoke(group, ["merge", *map(str, words)])
    return ran.exit_code, ran.output


def show_status(*words: str | Path) -> str:
    return CliRunner().invoke(group, ["status", *map(str, words)]).output


def timeless(path: Path) -> list[dict]:
    """The lines of a results file without the time at which they were written."""
    lines = read_lines(path)
    for line in lines:
        line["response"]["body"].pop("created", None)
    return lines


def number(line: dict) -> int:
    return int(line["id"].rpartition("_")[2])


@pytest.mark.parametrize("apart", [False, True])
def test_merged_shards_are_the_job_without_shards_in_order(apart: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    rows = [completion(f"row {i}", "x" * (i % 9)) for i in range(3000)]
    rows = [*MIXED, *rows, *rows[:50], *(completion(None) for _ in range(9))]
    random.Random(7).shuffle(rows)
    write_lines(source, rows)
    shards = run_shards(source, 3, apart=apart)
    run_part(source, tmp_path / "whole")
    expected = sorted(timeless(tmp_path / "whole"), key=number)
    assert run_merge(out, *shards)[0] == 1
    assert timeless(out) == expected
    again = run_part(source, out)
    assert (again.answered, again.failed) == (0, 0)
    assert timeless(out) == expected


def test_error_rows_go_where_they_are_asked_to_go(tmp_path: Path) -> None:
    source, out, errors = (tmp_path / name for name in ("in", "out", "errors"))
    write_lines(source, MIXED)
    shards = run_shards(source, 2)
    code, said = run_merge(out, *shards, "--error-file", errors)
    assert code == 1
    assert "rows      3 answered, 7 errors" in said
    assert [line["error"] is None for line in read_lines(out)] == [True] * 3
    assert [line["error"] is None for line in read_lines(errors)] == [False] * 7
    again = run_part(source, out, errors=errors)
    assert (again.answered, again.failed, again.failed_before) == (0, 0, 7)


def test_rows_that_are_left_are_counted_and_can_be_answered_after_a_partial_merge(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_lines(source, [completion(f"row {i}") for i in range(30)])
    shards = run_shards(source, 3)
    shards[1].unlink()
    run_part(source, shards[1], Shard(2, 3), most=2)
    left = 30 - sum(len(read_lines(shard)) for shard in shards)
    code, said = run_merge(out, *shards)
    assert code == 75
    assert f"left      {left} rows: {left} of shard 2\n" in said
    assert not out.exists()
    code, said = run_merge(out, *shards, "--partial")
    assert code == 75
    assert "results   " in said
    assert run_part(source, out).answered == left
    assert sorted(line["custom_id"] for line in read_lines(out)) == sorted(
        f"row {i}" for i in range(30)
    )


def test_what_stopped_shards_have_begun_goes_along(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_lines(source, [completion(f"row {i}", n=2) for i in range(8)])
    shards = run_shards(source, 2)
    shards[0].unlink()
    stopped = run_part(source, shards[0], Shard(1, 2), most=1)
    assert stopped.begun_rows == 1
    merge(out, shards, partial=True)
    assert unfinished_path(out).read_bytes() == unfinished_path(shards[0]).read_bytes()
    run_part(source, out)
    assert len(read_lines(out)) == 8


@pytest.mark.parametrize("apart", [False, True])
def test_rows_that_were_edited_since_are_counted_by_merge_and_status(
    apart: bool, tmp_path: Path
) -> None:
    """Of those that have a line, and a name to be known by."""
    source, out = tmp_path / "in", tmp_path / "out"
    bad = completion("bad", temperature=9)
    rows = [*(completion(f"row {i}") for i in range(20)), bad, completion(None), completion("x")]
    write_lines(source, rows)
    shards = run_shards(source, 2, apart=apart)
    code, said = run_merge(out, *shards)
    assert "changed" not in said + show_status(*shards)
    out.unlink()
    rows[3] = completion("row 3", "another prompt")
    rows[4]["body"]["max_tokens"] = 7
    bad["body"]["temperature"] = 1
    write_lines(source, [completion("new"), *rows[:21], completion(None, "another"), rows[22]])
    code, said = run_merge(out, *shards, "--partial")
    assert (code, "changed   3 rows were edited" in said) == (75, True)
    assert "changed 3 rows were edited since" in show_status(*shards)
    assert "changed 3 rows were edited since" in show_status(out)
    found = json.loads(show_status("--json", *shards))
    assert found["total"]["changed"] == sum(each["changed"] for each in found["files"]) == 3
    assert len(run_part(source, out)._intake.changed) == 3, "as a run counts them"


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_changed_input_decides_about_rows_order_and_ids(rewritten: bool, tmp_path: Path) -> None:
    """Also if another program has written the lines anew, as `jq -S` does."""
    source, out = tmp_path / "in", tmp_path / "out"
    rows = [completion(f"row {i}") for i in range(20)]
    write_lines(source, rows)
    shards = run_shards(source, 2)
    rows = [completion("new"), *rows[:5], *rows[8:]]
    write_lines(source, rows)
    for index, shard in enumerate(shards, start=1):
        run_part(source, shard, Shard(index, 2))
        if rewritten:
            lines = [json.dumps(line, sort_keys=True).encode() for line in read_lines(shard)]
            write_lines(shard, lines)
    merged = merge(out, shards)
    assert (merged.answered, merged.gone, merged.missing) == (18, 3, 0)
    assert set(merged.gone_names) == {"row 5", "row 6", "row 7"}
    lines = read_lines(out)
    assert [line["custom_id"] for line in lines] == [row["custom_id"] for row in rows]
    assert [number(line) for line in lines] == list(range(18))
    assert run_part(source, out).answered == 0


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    write_lines(tmp_path / "in", [completion(f"row {i}") for i in range(20)])
    return run_shards(tmp_path / "in", 3)


def test_what_does_not_belong_together_is_refused(shards: list[Path], tmp_path: Path) -> None:
    source = tmp_path / "in"
    whole, fourth, other = (tmp_path / name for name in ("whole", "out.of4", "other"))
    run_part(source, whole)
    run_part(source, fourth, Shard(4, 4))
    run_part(source, other, Shard(3, 3), seed=5)
    cases = [
        (shards[:2], "shards 3 of 3 are not given"),
        ([*shards, whole], "is no shard"),
        ([*shards[:2], fourth], "not shards of one job"),
        ([*shards, shards[0]], "are both shard 1/3"),
        ([*shards[:2], other], "defaults.seed"),
        ([*shards[:2], tmp_path / "none"], "No such file"),
    ]
    for given, said in cases:
        code, output = run_merge(tmp_path / "out", *given)
        assert code == 2
        assert said in output.replace("\n", " ")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["the same file", "another shard", "the error file"])
def test_a_row_with_two_lines_is_refused_by_name(
    where: str, shards: list[Path], tmp_path: Path
) -> None:
    """In the file where `read_answered` looks, in another shard's, or among error rows."""
    line = shards[0].read_bytes().splitlines(keepends=True)[0]
    file = {"the same file": shards[0], "another shard": shards[1]}.get(where, tmp_path / "errors")
    if where == "the error file":
        shards[0].unlink()
        run_part(tmp_path / "in", shards[0], Shard(1, 3), errors=file)
        file.write_bytes(line)
    else:
        file.write_bytes(file.read_bytes() + line)
    code, said = run_merge(tmp_path / "out", *shards)
    assert code == 2
    assert str(json.loads(line)["custom_id"]) in said.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_an_input_that_is_still_copied_is_refused(
    whole: bool, shards: list[Path], tmp_path: Path
) -> None:
    """Within a line after whole ones, or within its only line."""
    with (tmp_path / "in").open("ab" if whole else "wb") as file:
        file.write(b'{"custom_id": "torn')
    code, said = run_merge(tmp_path / "out", *shards)
    assert code == 2
    assert "still being copied" in said
    assert not (tmp_path / "out").exists()


def test_shards_of_nothing_make_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [])
    merged = merge(tmp_path / "out", run_shards(tmp_path / "in", 2))
    assert (merged.answered, merged.missing, merged.written) == (0, 0, True)
    assert (tmp_path / "out").read_bytes() == b""


def test_nothing_that_is_there_is_written_over(shards: list[Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out in (shards[0], tmp_path / "in"):
        code, _ = run_merge(out, *shards)
        assert code == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_moved_input_is_asked_for(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in").rename(tmp_path / "moved")
    assert run_merge(tmp_path / "out", *shards)[0] == 2
    assert run_merge(tmp_path / "out", *shards, "-i", tmp_path / "moved")[0] == 0
    assert len(read_lines(tmp_path / "out")) == 20


def test_a_torn_last_line_is_a_row_that_is_left(shards: list[Path], tmp_path: Path) -> None:
    shards[2].write_bytes(shards[2].read_bytes()[:-20])
    assert merge(tmp_path / "out", shards).left == {3: 1}


def test_all_is_well_with_a_pattern_that_finds_side_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", MIXED)
    run_shards(tmp_path / "in", 2)
    found = sorted(tmp_path.glob("out.*"))
    assert len(found) == 4
    assert run_merge(tmp_path / "merged", *found)[0] == 1
    assert len(read_lines(tmp_path / "merged")) == MIXED_ROWS
