"""When a job that was stopped goes back into the queue."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from job_script import ANSWER, PROGRAMS, run_script, sbatch

from hpc_distkv.batch.results.side_files import is_side_file
from hpc_distkv.cli.status import command as show_status
from hpc_distkv.slurm.script import FRUITLESS


def test_a_job_that_does_not_get_on_in_all_its_time_is_not_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sbatch(monkeypatch, "--time", "5").output
    (tmp_path / "results.jsonl").write_text("row\n")
    assert "scontrol" not in run_script(text, tmp_path, ":", left=120)
    assert "scontrol" in run_script(text, tmp_path, left=120), "one that gets on is"


def test_a_job_that_is_stopped_as_it_starts_is_requeued_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by preemptions while the model loads; a start that gets on begins the count anew."""
    text = sbatch(monkeypatch, "--mpi", "pmi2").output

    def requeued(job: str) -> bool:
        return "scontrol" in run_script(text, tmp_path, job)

    before = {path.name for path in tmp_path.iterdir()}
    empty = "touch results.jsonl"
    assert [requeued(empty) for _ in range(FRUITLESS - 1)] == [True] * (FRUITLESS - 1)
    assert requeued(ANSWER)
    assert [requeued(":") for _ in range(FRUITLESS)] == [True] * (FRUITLESS - 1) + [False]
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left == {*PROGRAMS, "script", "calls", "results.jsonl"}


def test_without_a_time_limit_or_an_answer_of_slurm_only_starts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sbatch(monkeypatch, "--mpi", "pmi2").output
    for said in ("echo N/A", "echo", "exit 1"):
        monkeypatch.setitem(PROGRAMS, "squeue", said)
        assert "scontrol" in run_script(text, tmp_path, ":")


def test_error_rows_are_progress_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sbatch(monkeypatch, "--mpi", "pmi2", "--error-file", "bad rows.jsonl").output
    calls = run_script(text, tmp_path, "echo row >> 'bad rows.jsonl'", left=100)
    assert "scontrol" in calls


@pytest.mark.parametrize("status", [140, 143])
def test_a_signal_before_the_ranks_can_hear_it_is_a_start_that_was_stopped(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 + SIGUSR2 or SIGTERM: of a process that had no handlers yet. One that has answered rows
    has them, so then it is another's signal."""
    text = sbatch(monkeypatch, "--mpi", "pmi2").output

    def requeued(job: str, status: int = status) -> bool:
        return "scontrol" in run_script(text, tmp_path, job, status=status)

    assert [requeued(":") for _ in range(FRUITLESS)] == [True] * (FRUITLESS - 1) + [False]
    assert not requeued(ANSWER)
    assert not requeued(":", status=137)
    assert not list(tmp_path.glob("*.starts"))


def test_the_count_of_starts_is_no_results_file_and_goes_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sbatch(monkeypatch, "--mpi", "pmi2").output
    results = tmp_path / "results.jsonl"
    run_script(text, tmp_path, ":")
    (count,) = tmp_path.glob("results.jsonl.*")
    assert is_side_file(count, results)
    assert not is_side_file(count, tmp_path / "results")
    shards = [tmp_path / "results.jsonl.1", tmp_path / "results.jsonl.2"]
    for path in shards:
        path.write_text("")
        path.with_name(f"{path.name}.meta.json").write_text('{"format": 1}')
    shown = CliRunner().invoke(show_status, [*map(str, tmp_path.glob("results.jsonl.*"))])
    assert "sum of 2" in shown.output
    run_script(text, tmp_path, ":", left=60)
    assert not count.exists(), "the time limit leaves none"
