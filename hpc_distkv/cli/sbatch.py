"""`hpc-distkv sbatch`: write a job script, and submit it."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from hpc_distkv.cli.generate import command as generate
from hpc_distkv.cli.options import POSITIVE
from hpc_distkv.slurm.script import KINDS, MARGIN, JobScript

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpu": {},
    "cpu": {"gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 16, "nodes": 2},
    "array": {"nodes": 1},
    "mpirun": {"gpus_per_node": 0, "tasks_per_node": 2},
}
"""What differs from the defaults of `JobScript`."""


FILES = ("model", "source", "output")
"""Options of `generate` that the script has as variables."""
SIDE_FILES = ("--error-file", "--metrics", "--trace", "--prometheus")
"""What each job of an array would write anew."""


_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
    r"|(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+)|(?i:unlimited|infinite))"
)
"""Time limits of sbatch: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]]."""
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


def seconds(limit: str) -> int | None:
    """Of a time limit of sbatch, 0 for none; None: it is no time."""
    if not (match := _TIME.fullmatch(limit)):
        return None
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * part["days"] + part["h"] + part["hours"]
    return (
        3600 * hours
        + 60 * (part["m"] + part["minutes"] + part["only"])
        + (part["s"] + part["seconds"])
    )


def generate_options(words: Sequence[str]) -> dict[str, Any]:
    """What the options of `generate` among a command's words mean for the script. Raises
    UsageError for what `generate` would not take: better now than when the job starts."""
    script = JobScript()
    files = ["--model", script.model, "-i", script.input, "-o", script.output]
    context = generate.make_context("generate", [*files, *words])
    given = [
        parameter
        for parameter in generate.params
        if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    arguments: list[str] = []
    for parameter in given:
        value = context.params[str(parameter.name)]
        if parameter.name == "shard":
            raise click.UsageError("--shard is given by --kind array, with --shards.")
        if parameter.name not in (*FILES, "grace"):
            off = value is False and parameter.secondary_opts
            arguments.append(parameter.secondary_opts[-1] if off else parameter.opts[-1])
            arguments += [] if isinstance(value, bool) else [str(value)]
    found: dict[str, Any] = {"arguments": arguments}
    for name, option in zip(("model", "input", "output"), FILES, strict=True):
        found[name] = context.params[option]
    if any(parameter.name == "grace" for parameter in given):
        found["grace"] = math.ceil(context.params["grace"])
    return found


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
@click.option("--nodes", type=POSITIVE, help="Nodes.  [default: 4; cpu: 2; array: 1]")
@click.option(
    "--gpus-per-node", type=click.IntRange(min=0), help="GPUs, and ranks, of a node.  [default: 4]"
)
@click.option(
    "--tasks-per-node",
    type=POSITIVE,
    help="Ranks of a node without GPUs, or of mpirun.  [default: 2]",
)
@click.option("--cpus-per-task", type=POSITIVE, help="Cores of a rank.  [default: 8; cpu: 16]")
@click.option("--shards", type=POSITIVE, help="Jobs of an array.  [default: 8]")
@click.option("--time", callback=_limit, help="Time limit as of sbatch.  [default: 12:00:00]")
@click.option("--partition", callback=_word, help="As of sbatch.")
@click.option("--account", callback=_word, help="As of sbatch.")
@click.option("--job-name", callback=_word, help="As of sbatch.  [default: hpc-distkv]")
@click.option("--mpi", callback=_word, help="As of srun.  [default: pmix]")
@click.option("--container", help="Apptainer image that has hpc-distkv.")
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
    help="A further option of sbatch, such as '--qos=long'.",
)
@click.option("--submit", is_flag=True, help="Submit the script instead of printing it.")
@click.pass_context
def command(ctx: click.Context, /, submit: bool, **options: Any) -> None:
    """Write a Slurm job script for `hpc-distkv generate`, all options of which may follow
    (--model, -i, -o, --num-blocks ...), and print it or submit it.
    """  # fmt: skip
    given = {name: value for name, value in options.items() if value not in (None, ())}
    script = JobScript(
        **DEFAULTS[options["kind"]]
        | given
        | generate_options(ctx.args)
        | {"written_by": shlex.join(["hpc-distkv", *sys.argv[1:]])}
    )
    if script.kind == "array" and (side := set(SIDE_FILES) & set(script.arguments)):
        raise click.UsageError(
            f"all jobs of an array would write the file of {min(side)}: leave it out."
        )
    if script.gpus_per_node:
        if given.get("tasks_per_node", script.gpus_per_node) != script.gpus_per_node:
            raise click.UsageError("there is one rank per GPU: give --gpus-per-node alone.")
        script = replace(script, tasks_per_node=script.gpus_per_node)
    ahead = script.grace + MARGIN
    if options["kind"] != "mpirun" and 0 < (seconds(script.time) or 0) <= ahead:
        click.echo(
            f"Warning: --time {script.time} is not longer than the {ahead} s before its end at "
            "which the job is told to stop: it would stop as it begins.",
            err=True,
        )
    text = script.render()
    if not submit:
        click.echo(text, nl=False)
        return
    if options["kind"] == "mpirun":
        raise click.UsageError("--submit needs Slurm; run the script of --kind mpirun yourself.")
    try:
        done = subprocess.run(["sbatch"], input=text, text=True, check=False)
    except FileNotFoundError:
        raise click.ClickException("there is no sbatch on this machine.") from None
    raise SystemExit(done.returncode)
