"""`hpc-distkv status`: how far a job is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click

from hpc_distkv.batch.input.intake import MOST_NAMED, named
from hpc_distkv.batch.status import Status, read_statuses
from hpc_distkv.cli.options import MOVED_INPUT, results_files
from hpc_distkv.errors import STOPPED_STATUS, FaultError
from hpc_distkv.printable import printable
from hpc_distkv.units import duration


@click.command("status")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@MOVED_INPUT
@click.option("--error-file", type=click.Path(path_type=Path), help="Where the error rows are.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    results: tuple[Path, ...], source: Path | None, error_file: Path | None, as_json: bool
) -> None:
    """Count the rows of results files and what is left, without MPI or the model. Runs may be
    writing to them meanwhile. Of several files, such as the shards of an array, the sum is shown
    too; files that lie beside results, such as results.jsonl.meta.json, are passed over.

    Exit status: 0 all rows answered, 1 some rows are errors, 2 usage, also if the input cannot be
    read, 70 nothing is left but a last line of the input that has no end, 75 rows are left.
    """  # fmt: skip
    files = results_files(results)
    if error_file and len(files) > 1:
        raise click.UsageError("--error-file goes with one results file.")
    statuses = read_statuses(files, source, error_file)
    if as_json:
        click.echo(json.dumps(_figures(statuses), indent=2))
    else:
        lines = _lines(statuses[0]) if len(files) == 1 else _table(statuses)
        click.echo("\n".join(map(printable, lines)))
    raise SystemExit(_code(statuses))


def _code(statuses: Sequence[Status]) -> int:
    if any(status.left is None for status in statuses):
        return 2
    if any(status.left for status in statuses):
        return STOPPED_STATUS
    if any(status.torn is not None for status in statuses):
        return FaultError.exit_code
    return 1 if any(status.answered.failed for status in statuses) else 0


def _lines(status: Status) -> list[str]:
    answered = status.answered
    lines = [
        f"done    {status.done}",
        f"failed  {answered.failed}",
        f"left    {_unknown(status) if status.left is None else status.left}",
        f"tokens  {answered.prompt_tokens} in prompts, {answered.output_tokens} in outputs",
    ]
    if status.gone:
        lines.insert(2, f"gone    {_gone(status.gone, status.gone_names)}")
    if status.changed:
        lines.insert(2, f"changed {_changed(status.changed)}")
    lines += _torn([status])
    if status.begun:
        lines.append(f"begun   {status.begun} rows, {status.begun_tokens} output tokens so far")
    if status.owner:
        since = f", for {duration(status.seconds)}" if status.seconds else ""
        silent = f", no sign of life for {duration(status.silent)}" if status.silent else ""
        lines.append(f"run     {status.owner}{since}{silent}")
    if status.rate is not None:
        lines.append(f"rate    {_rate(status.rate, status.seconds_left)}")
    return lines


def _unknown(status: Status) -> str:
    return f"unknown: cannot read {status.source or 'the input, give it with -i'}"


def _gone(count: int, names: Sequence[str]) -> str:
    what = "1 of these rows is" if count == 1 else f"{count} of these rows are"
    return f"{what} not in the input any more{named(names, count)}"


def _torn(statuses: Sequence[Status]) -> list[str]:
    """Of each input that is not whole."""
    found = {status.source: status.torn for status in statuses if status.torn is not None}
    return [
        f"input   {source} ends within line {torn + 1}: is it still being copied?"
        for source, torn in found.items()
    ]


def _changed(count: int) -> str:
    were = "row was" if count == 1 else "rows were"
    return f"{count} {were} edited since (`generate --retry-changed` answers them again)"


def _rate(rate: float, seconds_left: float | None) -> str:
    if not rate:
        return "no row has ended yet in this run"
    left = "" if seconds_left is None else f", {duration(seconds_left)} left"
    return f"{60 * rate:.3g} rows a minute in this run{left}"


def _table(statuses: Sequence[Status]) -> list[str]:
    """A line for each file, and their sum."""
    rows: list[tuple[str, ...]] = [("file", "done", "failed", "left", "begun", "time left")]
    for status in statuses:
        left = "unknown" if status.left is None else str(status.left)
        time_left = "" if status.seconds_left is None else duration(status.seconds_left)
        if status.owner and not time_left:
            time_left = "silent" if status.silent else "runs"
        counts = (str(status.done), str(status.answered.failed), left, str(status.begun))
        rows.append((str(status.output), *counts, time_left))
    total = _total(statuses)
    left = "unknown" if total["left"] is None else total["left"]
    time_left = total["seconds_left"]
    rows.append(
        (
            f"sum of {len(statuses)}",
            *(str(n) for n in (total["done"], total["failed"], left, total["begun"])),
            "" if time_left is None else duration(time_left),
        )
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.append(
        f"tokens  {total['prompt_tokens']} in prompts, {total['output_tokens']} in outputs"
    )
    if total["gone"]:
        lines.append(f"gone    {_gone(total['gone'], total['gone_such_as'])}")
    if total["changed"]:
        lines.append(f"changed {_changed(total['changed'])}")
    if total["rows_per_second"]:
        lines.append(f"rate    {_rate(total['rows_per_second'], time_left)}")
    return [*lines, *_torn(statuses), *_missing(statuses)]


def _missing(statuses: Sequence[Status]) -> list[str]:
    """Shards that are not among the files."""
    shards = {status.shard for status in statuses if status.shard}
    lines = []
    for count in sorted({shard.count for shard in shards}):
        there = {shard.index for shard in shards if shard.count == count}
        if absent := [str(i) for i in range(1, count + 1) if i not in there]:
            lines.append(f"shards  {', '.join(absent)} of {count} are not among these files")
    return lines


def _total(statuses: Sequence[Status]) -> dict[str, Any]:
    """The sum. The time left is that of the file which takes longest, if all of them that have rows
    left are being written to."""
    lefts = [status.left for status in statuses]
    rates = [status.rate for status in statuses if status.rate is not None]
    times = [status.seconds_left for status in statuses if status.left]
    known = [seconds for seconds in times if seconds is not None]
    return {
        "done": sum(status.done for status in statuses),
        "failed": sum(status.answered.failed for status in statuses),
        "left": None if None in lefts else sum(left or 0 for left in lefts),
        "gone": sum(status.gone for status in statuses),
        "gone_such_as": sorted(chain.from_iterable(status.gone_names for status in statuses))[
            :MOST_NAMED
        ],
        "input_torn": any(status.torn is not None for status in statuses),
        "changed": sum(status.changed for status in statuses),
        "begun": sum(status.begun for status in statuses),
        "prompt_tokens": sum(status.answered.prompt_tokens for status in statuses),
        "output_tokens": sum(status.answered.output_tokens for status in statuses),
        "rows_per_second": sum(rates) if rates else None,
        "seconds_left": max(known) if known and len(known) == len(times) else None,
    }


def _figures(statuses: Sequence[Status]) -> dict[str, Any]:
    """All numbers, for programs."""
    files = [
        {
            "file": str(status.output),
            "shard": str(status.shard) if status.shard else None,
            "run": str(status.owner) if status.owner else None,
            **_total([status]),
        }
        for status in statuses
    ]
    return {"files": files, "total": _total(statuses)}
