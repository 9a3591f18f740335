"""`hpc-distkv report`: finished runs as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from hpc_distkv.printable import printable


@click.command("report")
@click.argument(
    "run", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="RUN..."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page.",
)
def command(run: tuple[Path, ...], output: Path) -> None:
    """Draw what `generate --metrics FILE --trace FILE` wrote as one HTML page.

    RUN are those files, in any order, or a folder that has them. One of the two is enough for a
    part of the page. Of several runs of a job (metrics.1.json, metrics.2.json, metrics.json), or of
    the shards of an array, the figures are put together and each run has a line; what is drawn over
    time is the last run that has a trace.
    """
    from hpc_distkv.observe.report.page import page
    from hpc_distkv.observe.summary.run_files import RunFileError, files_of, read_run
    from hpc_distkv.regular import replace_file

    try:
        files = read_run(run)
        html = page(files)
        if output.resolve() in map(Path.resolve, files_of(run)):
            raise RunFileError(f"{output} is a file of the run: give another one with -o")
        replace_file(output, [html.encode(errors="backslashreplace")])
    except OSError as error:
        raise RunFileError(f"cannot write {output}: {error}") from error
    if files.left_out:
        left_out = ", ".join(files.left_out)
        click.echo(printable(f"left out  {left_out}: the job was started anew since"))
    for why in files.unread:
        click.echo(printable(f"passed by {why}"))
    click.echo(printable(f"report    {output}"))
