"""`hpc-distkv status`: how far a job is."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_distkv.batch.status import Status, read_status
from hpc_distkv.printable import printable


@click.command("status")
@click.argument("results", type=click.Path(path_type=Path))
@click.option(
    "-i",
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help="Batch file, if it is not where it was.",
)
@click.option("--error-file", type=click.Path(path_type=Path), help="Where the error rows are.")
def command(results: Path, source: Path | None, error_file: Path | None) -> None:
    """Count the rows of a results file and what is left, without MPI or the model. A run may be
    writing to it meanwhile.

    Exit status: 0 all rows answered, 1 some rows are errors, 2 usage, also if the input cannot be
    read, 75 rows are left.
    """  # fmt: skip
    status = read_status(results, source, error_file)
    click.echo("\n".join(map(printable, _lines(status))))
    if status.left is None:
        raise SystemExit(2)
    failed = 1 if status.answered.failed else 0
    raise SystemExit(75 if status.left else failed)


def _lines(status: Status) -> list[str]:
    answered = status.answered
    left = f"unknown: cannot read {status.source or 'the input, give it with -i'}"
    lines = [
        f"done    {answered.lines - answered.failed}",
        f"failed  {answered.failed}",
        f"left    {left if status.left is None else status.left}",
        f"tokens  {answered.prompt_tokens} in prompts, {answered.output_tokens} in outputs",
    ]
    if status.begun:
        lines.append(f"begun   {status.begun} rows, {status.begun_tokens} output tokens so far")
    if status.owner:
        lines.append(f"run     {status.owner}")
    return lines
