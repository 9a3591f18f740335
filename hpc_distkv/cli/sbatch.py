"""`hpc-distkv sbatch`: write a job script, and submit it."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hpc_distkv.cli.generate import command as generate
from hpc_distkv.cli.options import POSITIVE, F, added, engine_settings
from hpc_distkv.comm.mpi.library import LaunchError
from hpc_distkv.slurm.memory import memory_needed
from hpc_distkv.slurm.options import MEMORY, PASSED_ON, WITHOUT_VALUE, instead, seconds
from hpc_distkv.slurm.script import KINDS, MARGIN, JobScript
from hpc_distkv.slurm.submission import check, log_file, send
from hpc_distkv.start.options import EngineOptions

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpu": {},
    "cpu": {"gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 16, "nodes": 2},
    "array": {"nodes": 1},
    "mpirun": {"gpus_per_node": 0, "tasks_per_node": 2},
}
"""What differs from the defaults of `JobScript`."""
FILES_OF_A_TASK = ("--error-file", "--metrics", "--trace", "--prometheus")
"""Options of `generate` that name a file which each task of an array writes for itself."""
_GPUS = re.compile(r"(?:[\w.-]+:)?\d{1,4}", re.ASCII)
_WORD = re.compile(r"[\w.,:@%+=-]+")


def _word(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A name that stands in a script without quotes."""
    if value is not None and not _WORD.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not one word of letters and digits.", ctx, param)
    return value


def _limit(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A time limit."""
    if value is not None and seconds(value) is None:
        raise click.BadParameter(f"{value!r} is no time: write for example 12:00:00.", ctx, param)
    return value


def _gpus(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """GPUs of a node: a number, with a type before it where there are several."""
    if value is not None and not _GPUS.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no number of GPUs: write for example 4 or a100:4.", ctx, param
        )
    return value


def generate_context(words: Sequence[str]) -> click.Context:
    """The options of `generate` among a command's words. Raises UsageError for what `generate`
    would not take: better now than when the job starts."""
    try:
        return generate.make_context("generate", ["--model", "", "-i", "", "-o", "", *words])
    except click.NoSuchOption as error:
        said = f"{error.format_message()} {instead(error.option_name)}"
        raise click.UsageError(said) from None


def generate_options(context: click.Context) -> dict[str, Any]:
    """What these options mean for the script, but for its files. Raises UsageError."""
    found: dict[str, Any] = {"arguments": [], "side_files": {}}
    for parameter in generate.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if name == "shard":
            raise click.UsageError("--shard is given by --kind array, with --shards.")
        if name == "grace":
            found["grace"] = math.ceil(value)
        elif parameter.opts[-1] in FILES_OF_A_TASK:
            found["side_files"][parameter.opts[-1]] = value
        elif name not in ("model", "source", "output"):
            off = value is False and parameter.secondary_opts
            found["arguments"].append(parameter.secondary_opts[-1] if off else parameter.opts[-1])
            found["arguments"] += [] if isinstance(value, bool) else [str(value)]
    return found


def _something(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """A value that is not empty, as one from an unset variable would be."""
    if value == "":
        raise click.BadParameter("it is empty.", ctx, param)
    return value


def _passed_on(name: str, short: str | None) -> Callable[[F], F]:
    """An option of sbatch that the script hands on."""
    # Of is_flag=False, click takes no value that begins with "-".
    flag = name in WITHOUT_VALUE or None
    spellings = [short, f"--{name}"] if short else [f"--{name}"]
    return click.option(*spellings, is_flag=flag, callback=_something, help="As of sbatch.")


@click.command(
    "sbatch", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="gpu",
    show_default=True,
    help="One rank per GPU; on CPUs; an array of shards; mpirun without Slurm.",
)
@click.option(
    "--model",
    callback=_something,
    help="Model directory.  [default: $MODEL of the environment of sbatch]",
)
@click.option("-i", "--input", callback=_something, help="Batch file.  [default: likewise $INPUT]")
@click.option(
    "-o", "--output", callback=_something, help="Results file.  [default: likewise $OUTPUT]"
)
@click.option("-N", "--nodes", type=POSITIVE, help="Nodes.  [default: 4; cpu: 2; array: 1]")
@click.option(
    "--gpus-per-node",
    callback=_gpus,
    help="GPUs, and ranks, of a node; with their type: a100:4.  [default: 4]",
)
@click.option(
    "--ntasks-per-node",
    "--tasks-per-node",
    "tasks_per_node",
    type=POSITIVE,
    help="Ranks of a node without GPUs, or of mpirun.  [default: 2]",
)
@click.option(
    "-c", "--cpus-per-task", type=POSITIVE, help="Cores of a rank.  [default: 8; cpu: 16]"
)
@click.option("--shards", type=POSITIVE, help="Jobs of an array.  [default: 8]")
@click.option("-t", "--time", callback=_limit, help="Time limit.  [default: 12:00:00]")
@click.option("-J", "--job-name", callback=_word, help="As of sbatch.  [default: hpc-distkv]")
@added(*starmap(_passed_on, PASSED_ON.items()))
@click.option(
    "--mpi",
    callback=_word,
    help="As of srun.  [default: what the MPI library that is installed here understands]",
)
@click.option("--container", callback=_something, help="Apptainer image that has hpc-distkv.")
@click.option(
    "--activate/--no-activate",
    default=None,
    help="Begin the job's PATH with the environment of this hpc-distkv.  [default: without "
    "--container]",
)
@click.option(
    "--line",
    "lines",
    multiple=True,
    help="A line of the script before the start, such as 'module load openmpi'.",
)
@click.option(
    "--sbatch-line",
    "sbatch_lines",
    multiple=True,
    help="A further option of sbatch, such as '--switches=1'.",
)
@click.option("--submit", is_flag=True, help="Submit the script instead of printing it.")
@click.pass_context
def command(ctx: click.Context, /, submit: bool, **options: Any) -> None:
    """Write a Slurm job script for `hpc-distkv generate`, all options of which may follow
    (--num-blocks, --ordered ...), and print it or submit it.

    Before it is submitted, model, input, output and log are looked at from here.
    """  # fmt: skip
    script = _script(options, ctx.args)
    _warn_of_time(script)
    text = script.render()
    if not submit:
        click.echo(text, nl=False)
        return
    if script.kind == "mpirun":
        raise click.UsageError("--submit needs Slurm; run the script of --kind mpirun yourself.")
    if script.needs:
        click.echo(f"Of its memory {script.needs}.", err=True)
    for warning in check(script, Path.cwd()):
        click.echo(f"Warning: {warning}", err=True)
    job = send(text)
    click.echo(f"the log of job {job} will be {log_file(script, Path.cwd(), job)}", err=True)
    click.echo(f"Submitted batch job {job}")


def _programs() -> str:
    """Where the programs of this environment are: beside this one."""
    found = shutil.which(sys.argv[0]) or sys.executable
    return str(Path(found).absolute().parent)


def _script(options: dict[str, Any], words: Sequence[str]) -> JobScript:
    """The script that the options ask for. Raises UsageError and ScriptError."""
    given = {name: value for name, value in options.items() if value not in (None, (), False)}
    container = "container" in given
    active = not container if options["activate"] is None else given.pop("activate", False)
    passed_on = {
        name: "" if found is True else found
        for name in PASSED_ON
        if (found := given.pop(name.replace("-", "_"), None))
    }
    context = generate_context(words)
    engine = engine_settings(context.params)
    script = JobScript(
        **DEFAULTS[options["kind"]]
        | (
            {}
            if options["kind"] == "mpirun" or "mpi" in given
            else {"mpi": _interface(container, active and not options["lines"])}
        )
        | given
        | _gpus_of(given)
        | generate_options(context)
        | {
            "written_by": shlex.join(["hpc-distkv", *sys.argv[1:]]),
            "passed_on": passed_on,
            "programs": _programs() if active else None,
            "dummy": engine.dummy,
        }
    )
    if script.gpus_per_node:
        if given.get("tasks_per_node", script.gpus_per_node) != script.gpus_per_node:
            raise click.UsageError("there is one rank per GPU: give --gpus-per-node alone.")
        script = replace(script, tasks_per_node=script.gpus_per_node)
    return _with_memory(script, engine)


def _with_memory(script: JobScript, options: EngineOptions) -> JobScript:
    """Asks Slurm for the memory that the job needs, unless that is given, or for all of a node (0)
    that it has for itself."""
    if not (needed := memory_needed(script, options)):
        return script
    script = replace(script, needs=needed.words)
    if script.names.intersection(MEMORY):
        return script
    mem = "0" if "exclusive" in script.names else f"{needed.mib}M"
    return replace(script, passed_on={**script.passed_on, "mem": mem})


def _gpus_of(given: dict[str, Any]) -> dict[str, Any]:
    """Number and type of the GPUs of a node, if they are given."""
    if "gpus_per_node" not in given:
        return {}
    kind, _, count = given["gpus_per_node"].rpartition(":")
    return {"gpus_per_node": int(count), "gpu_type": kind or None}


def _interface(container: bool, ours: bool) -> str:
    """srun's --mpi for the MPI library that is installed here. Warns where the job may have another
    one, as in a container, or if its environment is not `ours`."""
    from hpc_distkv.comm.mpi.library import load_library

    interface = JobScript.mpi
    try:
        if container:
            raise LaunchError("the MPI library of the container is not known here.")
        interface = load_library().srun_interface
        if not ours:
            raise LaunchError("with --no-activate or --line the job may have another MPI library.")
    except LaunchError as error:
        click.echo(f"Warning: --mpi {interface} is a guess: {error}", err=True)
    return interface


def _warn_of_time(script: JobScript) -> None:
    ahead = script.grace + MARGIN
    if script.kind != "mpirun" and 0 < (seconds(script.time) or 0) <= ahead:
        click.echo(
            f"Warning: --time {script.time} is not longer than the {ahead} s before its end at "
            "which the job is told to stop: it would stop as it begins.",
            err=True,
        )
