"""`hpc-distkv sbatch` writes the scripts in `jobs/`, and any other from the same template."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from job_script import HERE, run_script, sbatch, status
from mpirun import is_open_mpi

from hpc_distkv.slurm.options import seconds
from hpc_distkv.slurm.script import JobScript

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = {
    "generate.sbatch": "--kind gpu --mpi pmix --no-activate",
    "generate-cpu.sbatch": "--kind cpu --mpi pmix --no-activate",
    "array.sbatch": "--kind array --mpi pmix --no-activate",
    "generate-apptainer.sbatch": "--kind gpu --container hpc-distkv.sif --mpi pmix",
    "generate-mpirun.sh": "--kind mpirun --no-activate",
}


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


def test_names_with_spaces_and_options_reach_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--model", "/a model", "-i", "in put", "-o", "out $put")
    options = ("--kv-memory", "4GiB", "--overwrite", "--policy", "queue", "--grace", "10")
    more = ("--line", "export NOTE=1", "--mpi", "pmi2", "--no-enable-prefix-caching")
    ran = sbatch(monkeypatch, *files, *options, *more)
    assert "#SBATCH --signal=USR2@40" in ran.output
    theirs = {"MODEL": "another", "INPUT": "of", "OUTPUT": "theirs"}
    calls = run_script(ran.output, tmp_path, **theirs)
    assert calls == [
        *("srun", "--mpi=pmi2", "--cpus-per-task=8", "--export=ALL"),
        *("--kill-on-bad-exit=1", "--label"),
        *("hpc-distkv", "generate", *files, "--grace", "10"),
        *("--overwrite", "--kv-memory", str(4 << 30), "--policy", "queue"),
        "--no-enable-prefix-caching",
        *("scontrol", "requeue", "77"),
    ]


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
    calls = run_script(ran.output, tmp_path, **ids)
    assert "all.jsonl.3" in calls
    assert calls[calls.index("--shard") + 1] == "3/20"
    assert calls[-3:] == ["scontrol", "requeue", "77_3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-blocks none", "'none' is not a valid integer"),
        ("--no-such-option 3", "No such option"),
        ("--kind array --shard 1/3", "--shards"),
        ("--kind mpirun --submit", "needs Slurm"),
        ("--gpus-per-node 8 --tasks-per-node 2", "one rank per GPU"),
        ("--kind nothing", "is not one of"),
        ("--time abc", "'abc' is no time: write for example 12:00:00"),
        ("--time 1-", "'1-' is no time"),
        ("--job-name a$b", "'a$b' is not one word"),
        ("--gpus-per-node many", "'many' is no number of GPUs"),
        ("--sbatch-line qos=long", "is no option of sbatch"),
        ("--sbatch-line --nodes=3", "the script has --nodes already; give --nodes"),
        ("--sbatch-line -N3", "the script has --nodes already; give --nodes"),
        ("-q a --sbatch-line --qos=b", "the script has --qos already; give --qos"),
        ("--sbatch-line --comment='a", "cannot be read"),
        ("-n8", "--nodes times --gpus-per-node"),
        ("--gpus=8", "--nodes times --gpus-per-node"),
        ("-e err.log", "--sbatch-line '--error=FILE'"),
        ("--array=1-4", "--kind array, with --shards"),
        ("--switches=1", "--sbatch-line '--switches=...'"),
        ("--qos=", "it is empty"),
        ("--line #SBATCH", "give it as --sbatch-line"),
    ],
)
def test_what_a_job_would_not_take_is_refused_before_it_is_submitted(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sbatch(monkeypatch, *words.split())
    assert status(ran) == 2
    assert said in ran.output + str(ran.exception)


def test_each_task_of_an_array_has_side_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--metrics", "my runs/m.json", "--trace", "t.json.gz", "--error-file", "bad.jsonl")
    ran = sbatch(monkeypatch, "--kind", "array", *words, "--prometheus", "p.prom")
    calls = run_script(ran.output, tmp_path, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="77")
    found = {option: calls[calls.index(option) + 1] for option in (*words[::2], "--prometheus")}
    assert found == {
        "--metrics": "my runs/m.3.json",
        "--trace": "t.3.json.gz",
        "--error-file": "bad.3.jsonl",
        "--prometheus": "p.3.prom",
    }
    assert "--metrics m.json" in sbatch(monkeypatch, "--metrics", "m.json").output


SHORT_FORMS = (
    "-p long -A me -q high -N 3 -C a100 -d afterok:7 -t 5:00 -J name -c 3 -D / -w n1 -x n2"
)


def test_options_of_slurm_have_their_own_names_and_short_forms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = ("--exclusive", "--mem=64G", "--mail-user=a@b.c", "--mail-type=END", "--comment=a 'b'")
    words = (*SHORT_FORMS.split(), *long, "--gpus-per-node=a100:2", "-ostats.jsonl")
    text = sbatch(monkeypatch, *words).output
    lines = {shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert lines >= {
        *("--partition=long", "--account=me", "--qos=high", "--nodes=3", "--constraint=a100"),
        *("--dependency=afterok:7", "--time=5:00", "--job-name=name", "--cpus-per-task=3"),
        *("--chdir=/", "--nodelist=n1", "--exclude=n2", *long),
        *("--gpus-per-node=a100:2", "--ntasks-per-node=2"),
    }
    assert "OUTPUT=stats.jsonl" in text
    cpu = sbatch(monkeypatch, "--kind", "cpu", "--ntasks-per-node", "3").output
    assert "#SBATCH --ntasks-per-node=3" in cpu


@pytest.mark.parametrize(
    "line",
    ["--qos=long", "#SBATCH --qos=long", "#SBATCH #SBATCH  --qos=long ", "#sbatch --qos=long"],
)
def test_a_line_for_slurm_may_come_with_its_beginning(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\n#SBATCH --qos=long\n" in sbatch(monkeypatch, "--sbatch-line", line).output


def test_the_job_finds_the_programs_of_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sbatch(monkeypatch, "--mpi", "pmi2", "--line", "command -v hpc-distkv > found").output
    run_script(text, tmp_path)
    assert (tmp_path / "found").read_text() == f"{HERE / 'hpc-distkv'}\n"
    for word in ("--no-activate", "--container=a.sif"):
        assert str(HERE) not in sbatch(monkeypatch, "--mpi", "pmi2", word).output


def test_the_interface_is_that_of_the_mpi_library_here(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = "pmix" if is_open_mpi() else "pmi2"
    assert f"srun --mpi={interface} " in sbatch(monkeypatch).output


@pytest.mark.parametrize("line", ["--switches=1 --partition=b", "--switches 1 -pb", "-M c -p b"])
def test_every_option_of_a_line_is_looked_at(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = sbatch(monkeypatch, "--sbatch-line", line, "-p", "a")
    assert status(ran) == 2
    assert "the script has --partition already" in str(ran.exception)
    script = JobScript(sbatch_lines=["--switches=1 --mem=9G -o 'my log' # -p b"])
    assert script.names == {"switches", "mem", "output"}
    assert script.log == "my log"


@pytest.mark.parametrize("words", [["--no-activate"], ["--line", "ml x"], ["--container", "a.sif"]])
def test_the_interface_of_a_library_that_is_not_seen_is_said_to_be_a_guess(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is a guess" in sbatch(monkeypatch, *words).stderr
    assert "is a guess" not in sbatch(monkeypatch, *words, "--mpi", "pmix").stderr
    assert "is a guess" not in sbatch(monkeypatch).stderr
