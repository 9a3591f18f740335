"""`hpc-distkv sbatch --submit` looks at what it can see, and says where the log will be."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from job_script import sbatch, status


class Submission:
    """A folder with all that a job needs, and an sbatch that takes any script."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.words = ["--mpi", "pmi2", "--model", str(model), "-i", "in.jsonl", "-o", "out.jsonl"]
        self._patch = monkeypatch
        (folder / "in.jsonl").write_text("{}\n")
        (folder / "sbatch").write_text('#!/bin/bash\ncat > submitted; echo "418;cluster"')
        (folder / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.chdir(folder)

    def send(self, *words: str) -> Result:
        return sbatch(self._patch, *self.words, *words, "--submit")

    @property
    def sent(self) -> bool:
        return (self.folder / "submitted").exists()


@pytest.fixture
def submission(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    return Submission(tmp_path, tiny_model, monkeypatch)


def test_submitting_says_the_number_of_the_job_and_where_its_log_will_be(
    submission: Submission,
) -> None:
    ran = submission.send()
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == "Submitted batch job 418\n"
    assert f"{submission.folder}/hpc-distkv-418.log" in ran.stderr
    assert "on this machine alone?" in ran.stderr, "it is in /tmp"
    assert f"{submission.folder}/l-418" in submission.send("--sbatch-line", "-o l-%j").stderr
    ran = submission.send("--kind", "array", "-J", "x")
    assert f"{submission.folder}/x-418_*.log" in ran.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-i", "no.jsonl"], "cannot read"),
        (["-i", "."], "cannot read"),
        (["--model", "."], "config.json is missing"),
        (["--model", "nowhere"], "is no directory"),
        (["-o", "no/out.jsonl"], "is no directory to write in"),
        (["-o", "."], "it is a directory"),
        (["--metrics", "no/m.json"], "cannot write --metrics"),
        (["--chdir", "no"], "no directory to write the job's log in"),
    ],
)
def test_what_can_be_seen_to_fail_is_not_submitted(
    words: list[str], said: str, submission: Submission
) -> None:
    ran = submission.send(*words)
    assert status(ran) == 2
    assert said in str(ran.exception)
    assert not submission.sent


def test_files_that_the_environment_or_a_container_names_are_left_to_the_job(
    submission: Submission,
) -> None:
    assert submission.send("--container", "a.sif", "-i", "/data/in.jsonl").exit_code == 0
    submission.words = ["--mpi", "pmi2"]
    assert submission.send().exit_code == 0


def test_a_model_needs_no_weights_where_they_are_random(
    submission: Submission, tiny_model: Path
) -> None:
    (submission.folder / "bare").mkdir()
    (submission.folder / "bare" / "config.json").write_bytes(
        (tiny_model / "config.json").read_bytes()
    )
    submission.words[3] = "bare"
    assert status(submission.send("--host-kv-path", "dummy")) == 2
    assert not submission.sent
    assert submission.send("--load-format", "dummy").exit_code == 0
