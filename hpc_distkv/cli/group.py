"""The commands of `hpc-distkv`, without torch and without MPI."""

from __future__ import annotations

import importlib
from typing import Any

import click

from hpc_distkv.errors import ExplainedError

COMMANDS = {
    "generate": "Answer a batch file on all ranks of the job.",
    "validate": "Check a batch file without loading the model.",
    "bench": "Measure throughput, policies, lending, the gManager; the published tables.",
    "env": "Show where a job would run, and what looks wrong about it.",
    "report": "Draw finished runs of a job as one HTML page.",
    "status": "Count what a results file holds, and what is left.",
    "merge": "Put the results of all shards together, checked against the input.",
    "sbatch": "Write a Slurm job script, or submit it.",
    "simulate": "Run a trace on a described cluster in virtual time.",
}


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
