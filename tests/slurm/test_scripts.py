"""`hpc-distkv sbatch` writes the scripts in `jobs/`, and any other from the same template."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpc_distkv.cli.sbatch import command, seconds

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = {
    "generate.sbatch": "--kind gpu",
    "generate-cpu.sbatch": "--kind cpu",
    "array.sbatch": "--kind array",
    "generate-apptainer.sbatch": "--kind gpu --container hpc-distkv.sif",
    "generate-mpirun.sh": "--kind mpirun",
}


def sbatch(monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    monkeypatch.setattr(sys, "argv", ["hpc-distkv", "sbatch", *words])
    return CliRunner().invoke(command, words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_in_jobs_are_what_the_command_writes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sbatch(monkeypatch, *SCRIPTS[name].split())
    assert ran.exit_code == 0, ran.output
    assert ran.output == (JOBS / name).read_text()


def test_every_script_in_jobs_is_written_by_the_command() -> None:
    assert {path.name for path in (*JOBS.glob("*.sbatch"), *JOBS.glob("*.sh"))} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", JOBS / name], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


ANSWER = 'while [ "$1" != -o ]; do shift; done; echo row >> "$2"'


def run_script(text: str, folder: Path, job: str = ANSWER, **environment: str) -> list[str]:
    """The words with which a script calls srun, which stands for a job that does `job` and is
    stopped, and what the script does then."""
    for program, rest in (("srun", f"{job}\nexit 75"), ("scontrol", "exit 0")):
        path = folder / program
        path.write_text(f"#!/bin/bash\nprintf '%s\\n' {program} \"$@\" >> calls\n{rest}\n")
        path.chmod(0o755)
    (folder / "script").write_text(text)
    done = subprocess.run(
        ["bash", "script"],
        cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin", **environment},
        check=False,
    )
    assert done.returncode == 75
    return (folder / "calls").read_text().splitlines()


def test_names_with_spaces_and_options_reach_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--model", "/a model", "-i", "in put", "-o", "out $put")
    options = ("--kv-memory", "4GiB", "--overwrite", "--policy", "queue", "--grace", "10")
    more = ("--line", "export NOTE=1", "--mpi", "pmi2", "--no-enable-prefix-caching")
    ran = sbatch(monkeypatch, *files, *options, *more)
    assert "#SBATCH --signal=USR2@40" in ran.output
    theirs = {"MODEL": "another", "INPUT": "of", "OUTPUT": "theirs"}
    calls = run_script(ran.output, tmp_path, SLURM_CPUS_PER_TASK="8", SLURM_JOB_ID="77", **theirs)
    assert calls == [
        *("srun", "--mpi=pmi2", "--cpus-per-task=8", "--kill-on-bad-exit=1", "--label"),
        *("hpc-distkv", "generate", *files, "--grace", "10"),
        *("--overwrite", "--kv-memory", str(4 << 30), "--policy", "queue"),
        "--no-enable-prefix-caching",
        *("scontrol", "requeue", "77"),
    ]


def test_a_job_that_does_not_get_on_is_not_requeued_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sbatch(monkeypatch, "--time", "5").output
    (tmp_path / "results.jsonl").write_text("row\n")
    calls = run_script(text, tmp_path, ":", SLURM_CPUS_PER_TASK="8", SLURM_JOB_ID="77")
    assert "scontrol" not in calls


@pytest.mark.parametrize(
    ("time", "length"),
    [
        ("5", 300),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-2", 93600),
        ("UNLIMITED", 0),
        ("1-2:3:4", 93784),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, length: int) -> None:
    assert seconds(time) == length


def test_a_time_limit_that_is_over_with_the_warning_before_it_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (
        "Warning: --time 1 is not longer than the 120 s"
        in sbatch(monkeypatch, "--time", "1").output
    )
    assert "Warning" not in sbatch(monkeypatch, "--time", "3").output


def test_a_task_of_an_array_answers_its_shard_and_requeues_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sbatch(monkeypatch, "--kind", "array", "--shards", "20", "-o", "all.jsonl")
    ids = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "80"}
    calls = run_script(ran.output, tmp_path, SLURM_CPUS_PER_TASK="8", **ids)
    assert "all.jsonl.3" in calls
    assert calls[calls.index("--shard") + 1] == "3/20"
    assert calls[-3:] == ["scontrol", "requeue", "77_3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--kind array --metrics m.json", "all jobs of an array would write the file of --metrics"),
        ("--num-blocks none", "'none' is not a valid integer"),
        ("--no-such-option 3", "No such option"),
        ("--kind array --shard 1/3", "--shards"),
        ("--kind mpirun --submit", "needs Slurm"),
        ("--gpus-per-node 8 --tasks-per-node 2", "one rank per GPU"),
        ("--kind nothing", "is not one of"),
        ("--time abc", "'abc' is no time: write for example 12:00:00"),
        ("--time 1-", "'1-' is no time"),
        ("--partition a;b", "'a;b' is not one word"),
        ("--job-name a$b", "'a$b' is not one word"),
        ("--account a/b", "'a/b' is not one word"),
    ],
)
def test_what_a_job_would_not_take_is_refused_before_it_is_submitted(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sbatch(monkeypatch, *words.split())
    assert ran.exit_code == 2
    assert said in ran.output
