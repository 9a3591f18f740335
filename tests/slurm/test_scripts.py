"""`hpc-distkv sbatch` writes the scripts in `jobs/`, and any other from the same template."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from mpirun import is_open_mpi

from hpc_distkv.cli.sbatch import HERE, command, seconds
from hpc_distkv.slurm.options import PASSED_ON, WITHOUT_VALUE
from hpc_distkv.slurm.script import FRUITLESS, KINDS

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = {
    "generate.sbatch": "--kind gpu --mpi pmix --no-activate",
    "generate-cpu.sbatch": "--kind cpu --mpi pmix --no-activate",
    "array.sbatch": "--kind array --mpi pmix --no-activate",
    "generate-apptainer.sbatch": "--kind gpu --container hpc-distkv.sif",
    "generate-mpirun.sh": "--kind mpirun --no-activate",
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
PROGRAMS = {
    "srun": "{job}\nexit 75",
    "scontrol": "exit 0",
    "squeue": "date -d '+{left} seconds' +%Y-%m-%dT%H:%M:%S",
}


def run_script(
    text: str, folder: Path, job: str = ANSWER, left: int = 40_000, **environment: str
) -> list[str]:
    """The words with which a script calls srun, which stands for a job that does `job` and is
    stopped `left` seconds before its time limit, and what the script does then."""
    (folder / "calls").write_text("")
    for program, rest in PROGRAMS.items():
        path = folder / program
        said = rest.format(job=job, left=left)
        heard = "" if program == "squeue" else f"printf '%s\\n' {program} \"$@\" >> calls\n"
        path.write_text(f"#!/bin/bash\n{heard}{said}\n")
        path.chmod(0o755)
    (folder / "script").write_text(text)
    done = subprocess.run(
        ["bash", "script"],
        cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin", **STEP, **environment},
        check=False,
    )
    assert done.returncode == 75
    return (folder / "calls").read_text().splitlines()


STEP = {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "77"}


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
        *("srun", "--mpi=pmi2", "--cpus-per-task=8", "--kill-on-bad-exit=1", "--label"),
        *("hpc-distkv", "generate", *files, "--grace", "10"),
        *("--overwrite", "--kv-memory", str(4 << 30), "--policy", "queue"),
        "--no-enable-prefix-caching",
        *("scontrol", "requeue", "77"),
    ]


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
        ("--qos=", "it is empty"),
    ],
)
def test_what_a_job_would_not_take_is_refused_before_it_is_submitted(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sbatch(monkeypatch, *words.split())
    assert status(ran) == 2
    assert said in (ran.output or str(ran.exception))


def status(ran: Result) -> int:
    """With which `hpc-distkv` would leave."""
    return getattr(ran.exception, "exit_code", ran.exit_code)


NOT_WORDS = ["a;b", "a$b", "a b", "a\nb", ""]


@pytest.mark.parametrize("value", NOT_WORDS)
@pytest.mark.parametrize("option", ["--job-name", "--mpi", "--gpus-per-node", "--time"])
def test_what_stands_without_quotes_is_one_word(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(sbatch(monkeypatch, option, value)) == 2


TEXT_OPTIONS = [
    *(f"--{name}" for name in PASSED_ON if name not in WITHOUT_VALUE),
    *("--model", "-i", "-o", "--container", "--line", "--sbatch-line", "--error-file", "--metrics"),
]


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\u2028", "\udcff"])
@pytest.mark.parametrize("option", TEXT_OPTIONS)
def test_no_value_brings_a_line_of_its_own(
    option: str, character: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sbatch(monkeypatch, option, f"x{character}touch hacked")
    assert status(ran) == 2
    assert "touch" not in ran.stdout
    assert "a job script cannot hold" in str(ran.exception)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([option for option in TEXT_OPTIONS if "line" not in option]),
            st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1)
            | st.sampled_from(["$(touch hacked)", "`touch hacked`", "'; touch hacked; '", "a # b"]),
        ),
        max_size=6,
        unique_by=lambda pair: pair[0],
    ),
    st.sampled_from(KINDS),
)
def test_values_reach_slurm_and_the_ranks_and_run_nothing(
    pairs: list[tuple[str, str]], kind: str
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        words = [f"{a}={b}" if a.startswith("--") else a + b for a, b in pairs]
        patch.delenv("MODEL", raising=False)
        ran = sbatch(patch, "--kind", kind, "--mpi", "pmi2", *words)
        assert ran.exit_code == 0, ran.output or ran.exception
        text = ran.output
        plain = sbatch(patch, "--kind", kind, "--mpi", "pmi2").output
        given_to_slurm = [pair for pair in pairs if pair[0][2:] in PASSED_ON]
        assert text.count("\n#SBATCH ") - plain.count("\n#SBATCH ") == (
            0 if kind == "mpirun" else len(given_to_slurm)
        )
        for option, value in given_to_slurm if kind != "mpirun" else ():
            line = next(x for x in text.splitlines() if x.startswith(f"#SBATCH {option}="))
            assert shlex.split(line, comments=False)[1] == f"{option}={value}"
        folder = Path(name)
        (folder / "mpirun").write_text(
            "#!/bin/bash\nprintf '%s\\n' mpirun \"$@\" >> calls; exit 75"
        )
        (folder / "mpirun").chmod(0o755)
        text = text.replace(f"export PATH={HERE}", "export PATH=.")
        calls = run_script(text, folder, ":", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="77")
        assert not (folder / "hacked").exists()
        for option, value in pairs:
            if option not in ("-o", *(pair[0] for pair in given_to_slurm)):
                side = kind == "array" and option in ("--error-file", "--metrics")
                assert side or value in calls


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


def test_error_rows_are_progress_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sbatch(monkeypatch, "--mpi", "pmi2", "--error-file", "bad rows.jsonl").output
    calls = run_script(text, tmp_path, "echo row >> 'bad rows.jsonl'", left=100)
    assert "scontrol" in calls


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
    assert "is in a directory of this machine alone" in ran.stderr, "it is in /tmp"
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
