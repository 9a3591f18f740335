"""`hpc-distkv validate`: check a batch file on the login node, before it costs node hours."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path

import click

from hpc_distkv.batch.answered import Answered
from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.footprint import Footprint, Pool
from hpc_distkv.batch.intake import Intake
from hpc_distkv.batch.rows import Row, parse_row
from hpc_distkv.batch.service import Limits, SamplingDefaults, Service
from hpc_distkv.cli.options import POSITIVE, Size
from hpc_distkv.control.percentiles import percentiles
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.printable import printable

EXAMPLES = 3
"""Bad rows shown for each error code."""
COLUMNS = ("line", "custom_id", "answers", "prompt", "output", "rBlocks", "ranks", "error")
"""Of the table of rows; tokens and rBlocks are those of each answer."""


class Report:
    """What is counted while the rows go by."""

    def __init__(self, limits: Limits, pool: Pool) -> None:
        """`pool`: of each rank."""
        self.limits = limits
        self.pool = pool
        self.good = 0
        self.bad: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.prompt_tokens = array("q")
        self.output_tokens = 0
        self.open_ended = 0
        self.one_rank = 0
        self.several_ranks = 0

    def add_good(self, row: Row) -> Footprint:
        """Count a row that can be answered."""
        needed = Footprint.of(row, self.pool)
        self.good += 1
        self.prompt_tokens.append(needed.prompt)
        if needed.output is None:
            self.open_ended += 1
        else:
            self.output_tokens += row.choices * needed.output
        if needed.ranks is not None:
            if needed.ranks == 1:
                self.one_rank += 1
            else:
                self.several_ranks += 1
        return needed

    def add_bad(self, number: int, error: RowError) -> None:
        """Count a row that will become an error row."""
        self.bad[error.code] += 1
        examples = self.examples.setdefault(error.code, [])
        if len(examples) < EXAMPLES:
            examples.append(f"line {number + 1}: {error.message}")

    def lines(self) -> list[str]:
        """The report as text."""
        bad = self.bad.total()
        return [
            f"rows          {self.good + bad}",
            f"good          {self.good}",
            f"bad           {bad}",
            *self._bad_lines(),
            *self._length_lines(),
            *self._placement_lines(),
        ]

    def _bad_lines(self) -> list[str]:
        lines = []
        for code, count in self.bad.most_common():
            lines.append(f"  {code}  {count}")
            lines += [f"    {example}" for example in self.examples[code]]
            if count > EXAMPLES:
                lines.append(f"    … and {count - EXAMPLES} more")
        return lines

    def _length_lines(self) -> list[str]:
        if not self.good:
            return []
        ordered = sorted(self.prompt_tokens)
        shown = ", ".join(f"{name} {tokens}" for name, tokens in percentiles(ordered).items())
        lines = [
            f"prompt tokens {sum(ordered)} in all; {shown}",
            f"output tokens {self.output_tokens} at most",
        ]
        if self.open_ended:
            lines.append(
                f"  and {self.open_ended} rows give no max_tokens: each may grow until prompt and "
                f"output make {self.limits.tokens} tokens; below they count with their prompt alone"
            )
        return lines

    def _placement_lines(self) -> list[str]:
        if self.pool.tokens is None:
            return []
        return [
            f"fit one rank  {self.one_rank} ({self.pool.tokens} tokens)",
            f"need several  {self.several_ranks}",
            f"fit nowhere   {self.bad['context_length_exceeded']} ({self.limits})",
        ]


def check_rows(path: str | Path, service: Service, report: Report, table: bool = False) -> None:
    """Stream the rows of a batch file into `report`, and print each if there is to be a `table`.
    Raises InputError."""
    intake = Intake(path)
    if table:
        click.echo("\t".join(COLUMNS))
    try:
        for envelope in intake.envelopes(Answered()):
            if envelope is None:
                continue
            cells: tuple[str, ...]
            try:
                row = parse_row(envelope, service)
            except RowError as error:
                report.add_bad(envelope.number, error)
                cells = (*("-" * (len(COLUMNS) - 3)), error.code)
            else:
                cells = (str(row.choices), *report.add_good(row).cells(), "-")
            if table:
                name = printable(envelope.custom_id or "-")
                click.echo("\t".join((str(envelope.number + 1), name, *cells)))
    finally:
        intake.close()


@click.command("validate")
@click.option("--model", required=True, help="Model directory.")
@click.option("-i", "--input", "source", required=True, help="Batch file (OpenAI JSONL).")
@click.option(
    "--max-model-len",
    type=POSITIVE,
    help="Longest prompt and output together, in tokens. [default: the model's]",
)
@click.option("--max-tokens", type=POSITIVE, help="Output tokens of rows that give no number.")
@click.option("--num-blocks", type=POSITIVE, help="rBlocks in the pool of one rank.")
@click.option(
    "--host-kv-memory",
    type=Size(),
    help="What --host-kv-memory will be, where a replica is one rank and --dtype the checkpoint's.",
)
@click.option("--block-size", type=POSITIVE, default=32, show_default=True, help="Tokens.")
@click.option(
    "--ranks",
    type=POSITIVE,
    default=1,
    show_default=True,
    help="Instances that can lend to each other: ranks over the tensor-parallel size.",
)
@click.option(
    "--rows",
    "table",
    is_flag=True,
    help="Also print every row: its tokens, rBlocks, and the ranks whose memory it needs.",
)
def command(
    model: str,
    source: str,
    max_model_len: int | None,
    max_tokens: int | None,
    num_blocks: int | None,
    host_kv_memory: int | None,
    block_size: int,
    ranks: int,
    table: bool,
) -> None:
    """Check a batch file without loading the model: bad rows, lengths, and what fits where.

    Exit status: 0 every row is good, 1 some rows are bad, 2 usage.
    """
    pool = Pool(block_size, num_blocks)
    config = ModelConfig.from_dir(model)
    host_blocks = (host_kv_memory or 0) // (block_size * config.kv_bytes_per_token())
    beside = host_blocks * block_size
    limits = Limits(
        max_model_len=config.longest(max_model_len),
        capacity_tokens=None if pool.tokens is None else pool.tokens * ranks + beside,
    )
    defaults = SamplingDefaults(max_tokens=max_tokens)
    service = Service.from_dir(model, config, limits, defaults)
    report = Report(limits, pool)
    check_rows(source, service, report, table)
    for line in report.lines():
        click.echo(printable(line))
    raise SystemExit(1 if report.bad else 0)
