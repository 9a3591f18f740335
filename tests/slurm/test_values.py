"""Whatever an option holds, a script says it to Slurm and to the ranks, and runs nothing of it."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from job_script import HERE, run_script, sbatch, status

from hpc_distkv.slurm.options import PASSED_ON, WITHOUT_VALUE
from hpc_distkv.slurm.script import KINDS

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
@example(pairs=[("--partition", "--")], kind="gpu")
@example(pairs=[("--partition", "-0")], kind="gpu")
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
