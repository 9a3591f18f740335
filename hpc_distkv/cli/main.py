"""The `hpc-distkv` command. Starts without torch and without MPI."""

from __future__ import annotations

import importlib
import io
import os
import sys
import time
import traceback
from typing import Any

import click

from hpc_distkv.errors import ExplainedError
from hpc_distkv.printable import LAYOUT, printable

COMMANDS = {
    "generate": "Answer a batch file on all ranks of the job.",
    "validate": "Check a batch file without loading the model.",
    "bench": "Measure throughput, policies, lending, the gManager; the published tables.",
    "env": "Show where a job would run, and what looks wrong about it.",
    "report": "Draw a finished run as one HTML page.",
    "status": "Count what a results file holds, and what is left.",
    "sbatch": "Write a Slurm job script, or submit it.",
    "simulate": "Run a trace on a described cluster in virtual time.",
}
RANK_VARIABLES = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
FIRST_WORDS = 2.0
"""Seconds that the other ranks leave the first one to say what is wrong: Open MPI's mpirun ends the
whole job when the first process leaves with a status other than 0."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"hpc_distkv.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An error that explains itself is told as those of click are."""
        try:
            return super().invoke(ctx)
        except ExplainedError as error:
            told = click.ClickException(str(error))
            told.exit_code = error.exit_code  # type: ignore[misc]
            raise told from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(package_name="hpc-distkv")
def group() -> None:
    """Offline batch generation with large language models on Slurm clusters, with a KV cache that
    is spread over MPI ranks."""


def main() -> None:
    """Run a command. What a user gets wrong is said once, by the first rank; a fault leaves with
    its own status, since 1 means rows that are errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    try:
        group.main(standalone_mode=False)
    except click.ClickException as error:
        error.message = printable(error.message, keep=LAYOUT)  # type: ignore[misc]
        if first_rank():
            error.show()
        else:
            time.sleep(FIRST_WORDS)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except Exception:
        click.echo(printable(traceback.format_exc(), keep=LAYOUT), err=True)
        sys.exit(os.EX_SOFTWARE)


def first_rank() -> bool:
    """Whether the launcher calls this process rank 0, or nothing at all. MPI need not run."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)
