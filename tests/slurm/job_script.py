"""Write job scripts as a user does, and run them with programs that stand for Slurm's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpc_distkv.cli.sbatch import command

ANSWER = 'while [ "$1" != -o ]; do shift; done; echo row >> "$2"'
HERE = Path(sys.executable).parent
STEP = {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "77"}
PROGRAMS = {
    "srun": "{job}\nexit {status}",
    "scontrol": "exit 0",
    "squeue": "date -d '+{left} seconds' +%Y-%m-%dT%H:%M:%S",
}


def run_script(
    text: str,
    folder: Path,
    job: str = ANSWER,
    left: int = 40_000,
    status: int = 75,
    **environment: str,
) -> list[str]:
    """The words with which a script calls srun, which stands for a job that does `job` and ends
    with `status` `left` seconds before its time limit, and what the script does then."""
    (folder / "calls").write_text("")
    for program, rest in PROGRAMS.items():
        path = folder / program
        said = rest.format(job=job, left=left, status=status)
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
    assert done.returncode == status
    return (folder / "calls").read_text().splitlines()


def sbatch(monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    monkeypatch.setattr(sys, "argv", [str(HERE / "hpc-distkv"), "sbatch", *words])
    return CliRunner().invoke(command, words)


def status(ran: Result) -> int:
    """With which `hpc-distkv` would leave."""
    return getattr(ran.exception, "exit_code", ran.exit_code)
