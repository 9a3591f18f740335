"""Submitting a job script: what can be seen from here first, then sbatch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.regular import real_path
from hpc_distkv.slurm.options import ScriptError
from hpc_distkv.slurm.script import JobScript

LOCAL = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders that every node has for itself."""


def check(script: JobScript, folder: Path) -> list[str]:
    """Look at what a job submitted in `folder` reads and writes, as far as the script names it;
    returns what may be wrong. Raises UserError for what cannot go well.

    In a container files may have other names, and the environment may name others: these are left
    to the job.
    """
    at = folder / script.folder
    if not os.access(at, os.W_OK):
        raise ScriptError(f"{at} is no directory to write the job's log in.")
    named = {"its directory": at, "its programs": script.programs}
    if not script.container:
        named |= {"--model": script.model, "-i": script.input, "-o": script.output}
        _check_files(script, at)
    local = [
        f"{what} {at / path}"
        for what, path in named.items()
        if path and any((at / path).resolve().is_relative_to(each) for each in LOCAL)
    ]
    if not local:
        return []
    return [f"{', '.join(local)}: on this machine alone? The nodes of the job may not see it."]


def _check_files(script: JobScript, at: Path) -> None:
    if script.programs and not Path(script.programs, "hpc-distkv").exists():
        raise ScriptError(f"there is no hpc-distkv in {script.programs}: give --no-activate.")
    if script.model is not None:
        ModelConfig.from_dir(at / script.model, weightless=script.dummy)
    if script.input is not None:
        Intake(at / script.input).close()
    for option, path in {"-o": script.output, **script.side_files}.items():
        if path is not None:
            _check_place(option, at / path)


def _check_place(option: str, path: Path) -> None:
    if path.is_dir():
        raise ScriptError(f"cannot write {option} {path}: it is a directory.")
    if path.exists() and not os.access(path, os.W_OK):
        raise ScriptError(f"cannot write {option} {path}: permission denied.")
    place = real_path(path).parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise ScriptError(f"cannot write {option} {path}: {place} is no directory to write in.")


def send(text: str) -> str:
    """Submit a script; returns the job's number. Raises ScriptError if there is no sbatch, and
    leaves with its status if that refuses the script."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=text,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            check=False,
        )
    except FileNotFoundError:
        raise ScriptError("there is no sbatch on this machine.") from None
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout.strip().partition(";")[0]


def log_file(script: JobScript, folder: Path, job: str) -> Path:
    """Where a job's log will be; of an array with a * for the number of a task."""
    name = script.log
    for pattern, text in (("%j", job), ("%A", job), ("%a", "*"), ("%x", script.job_name)):
        name = name.replace(pattern, text)
    return folder / script.folder / name
