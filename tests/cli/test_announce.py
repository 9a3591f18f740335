"""What `generate` says of a run: one meaning for each number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.files import Files
from hpc_distkv.cli.announce import header, summary
from hpc_distkv.comm.world import World


def figures(*, gone: Sequence[str] = (), **rows: int) -> dict:
    kinds = ("answered", "failed", "answered_before", "failed_before", "put_aside")
    counted = ("cached_tokens", "blocks_to_host", "blocks_borrowed", "peak_borrowed", "preemptions")
    return {
        "rows": dict.fromkeys(kinds, 0) | rows,
        "rows_not_in_input": len(gone),
        "rows_not_in_input_such_as": gone,
        "seconds": 2.0,
        "output_tokens_per_second": 5.0,
        "tokens_per_second": 9.0,
        "counters": dict.fromkeys(counted, 0),
        "stopped": False,
        "input_torn": False,
    }


@pytest.mark.parametrize("failed", [0, 2])
@pytest.mark.parametrize("failed_before", [0, 3])
def test_no_errors_are_said_only_where_the_status_is_0(failed, failed_before):
    rows = {"answered": 5, "answered_before": 12}
    told = summary(figures(**rows, failed=failed, failed_before=failed_before), Path("out"))
    first = told.splitlines()[0]
    errors = failed + failed_before
    assert first == f"rows      17 answered (5 in this run), {errors} errors ({failed} in this run)"


def test_rows_that_left_the_input_are_counted_and_named():
    told = summary(figures(answered_before=26, gone=["a\n"]), Path("out"))
    assert told.splitlines()[1].strip() == r"1 of them not in the input any more ('a\n')"
    told = summary(figures(answered_before=26, gone=[*"abcd"]), Path("out"))
    assert "4 of them not in the input any more ('a', 'b', 'c', …)\n" in told
    assert "any more" not in summary(figures(answered=26), Path("out"))


def test_a_header_says_which_run_of_which_job_it_is(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    world = World(0, (0, 0, 1, 1), hosts=("nid1", "nid1", "nid2", "nid2"))
    files = Files(Path("in"), Path("out"), shard=Shard(3, 8), job="77")
    told = header(world, files)
    for words in (
        "Slurm job 77, restart 2;",
        "4 ranks on 2 nodes: nid1, nid2;",
        "in to out, shard 3/8",
    ):
        assert words in told
    assert "Slurm" not in header(world, Files(Path("in"), Path("out")))
    many = World(0, tuple(range(500)), hosts=tuple(f"nid{n}" for n in range(500)))
    assert len(header(many, files)) < 300
