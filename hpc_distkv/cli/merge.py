"""`hpc-distkv merge`: the results of an array as one file."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_distkv.cli.options import MOVED_INPUT, results_files
from hpc_distkv.errors import STOPPED_STATUS
from hpc_distkv.printable import printable


@click.command("merge")
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT")
@click.argument(
    "shards", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SHARD..."
)
@MOVED_INPUT
@click.option(
    "--error-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where error rows go. [default: among the results]",
)
@click.option("--partial", is_flag=True, help="Merge what there is, though rows are left.")
def command(
    output: Path,
    shards: tuple[Path, ...],
    source: Path | None,
    error_file: Path | None,
    partial: bool,
) -> None:
    """Put the results of all shards of a job (--shard i/n) together in OUT, one line for each row
    of the input and in its order, without MPI or the model. The shards' files of error rows are
    found by themselves, and all files stay as they are. `generate` without --shard can go on with
    OUT: with rows that are left, that were added to the input, or that are errors.

    Exit status: 0 all rows answered, 1 some rows are errors, 2 usage, also where shards are
    missing, do not belong together or have a row twice, 75 rows are left: then nothing is written
    without --partial.
    """  # fmt: skip
    from hpc_distkv.batch.input.intake import named
    from hpc_distkv.batch.merge import merge

    files = results_files(shards)
    merged = merge(output, files, source, error_file, partial)
    click.echo(f"rows      {merged.answered} answered, {merged.failed} errors")
    if merged.gone:
        names = named(merged.gone_names, merged.gone)
        gone = f"gone      {merged.gone} rows are not in the input any more{names}: left out"
        click.echo(printable(gone))
    if merged.changed:
        click.echo(
            f"changed   {merged.changed} rows were edited since they were answered: these are the "
            "old lines (`generate --retry-changed` answers them again)"
        )
    if merged.missing:
        of = ", ".join(f"{count} of shard {index}" for index, count in merged.left.items())
        click.echo(f"left      {merged.missing} rows: {of}")
    if merged.written:
        click.echo(printable(f"results   {output}"))
    else:
        none = f"results   none: {output} is written when no row is left, or with --partial"
        click.echo(printable(none))
    raise SystemExit(STOPPED_STATUS if merged.missing else 1 if merged.failed else 0)
