"""`hpc-distkv validate`: check a batch file on the login node, before it costs node hours."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import click

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.rows import Row, parse_row
from hpc_distkv.batch.input.service import Limits, SamplingDefaults, Service
from hpc_distkv.batch.sizing import AssumedSpeed, Footprint, JobShape, MeasuredSpeed, Pool, Sizing
from hpc_distkv.cli.options import INPUT, LENGTHS, MODEL, POSITIVE, Number, added, engine_option
from hpc_distkv.control.messages.percentiles import percentiles
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.observe.summary.run_files import read_run
from hpc_distkv.printable import printable
from hpc_distkv.start.needs import dtype_of, rank_memory, wanted_bytes
from hpc_distkv.start.options import EngineOptions

SPEED = Number(min=0, min_open=True)
EXAMPLES = 3
"""Bad rows shown for each error code."""
COLUMNS = ("line", "custom_id", "answers", "prompt", "output", "rBlocks", "ranks", "error")
"""Of the table of rows; tokens and rBlocks are those of each answer."""


class ValidationReport:
    """What is counted while the rows go by."""

    def __init__(self, limits: Limits, shape: JobShape) -> None:
        self.limits = limits
        self.pool = shape.pool
        self.sizing = Sizing(shape)
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
        self.sizing.add(row, needed)
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

    def lines(self, speed: AssumedSpeed | MeasuredSpeed | None) -> list[str]:
        """The report as text; the time it takes if a `speed` is known."""
        bad = self.bad.total()
        return [
            f"rows          {self.good + bad}",
            f"good          {self.good}",
            f"bad           {bad}",
            *self._bad_lines(),
            *self._length_lines(),
            *self._placement_lines(),
            *self.sizing.lines(speed),
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


def check_rows(
    path: str | Path, service: Service, report: ValidationReport, table: bool = False
) -> None:
    """Stream the rows of a batch file into `report`, and print each if there is to be a `table`.
    Raises InputError."""
    intake = Intake(path)
    if table:
        click.echo("\t".join(COLUMNS))
    try:
        for envelope in intake.envelopes():
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
        if intake.torn is not None:
            said = "The input ends within this line: is it still being copied?"
            report.add_bad(intake.torn, RowError(said, code="torn_line"))
    finally:
        intake.close()


@click.command("validate")
@MODEL
@INPUT
@LENGTHS
@engine_option("num_blocks")
@engine_option("kv_memory", help="KV cache of one rank, if --num-blocks is not given.")
@added(*map(engine_option, ("host_kv_memory", "block_size", "dtype")))
@click.option("--ranks", type=POSITIVE, help="Ranks of the job.  [default: one replica's]")
@engine_option("tensor_parallel_size")
@engine_option("max_num_seqs")
@click.option(
    "--prompt-tokens-per-second",
    "prompt_speed",
    type=SPEED,
    help="Of the whole job, for an estimate of its time; give --output-tokens-per-second too.",
)
@click.option("--output-tokens-per-second", "output_speed", type=SPEED, help="Likewise.")
@click.option(
    "--metrics",
    type=click.Path(dir_okay=False),
    help="What --metrics of an earlier run with this model wrote, for an estimate of the time.",
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
    ranks: int | None,
    prompt_speed: float | None,
    output_speed: float | None,
    metrics: str | None,
    table: bool,
    **engine: Any,
) -> None:
    """Check a batch file without loading the model: bad rows, lengths, and what fits where; and
    what the job needs.

    Exit status: 0 every row is good, 1 some rows are bad, 2 usage.
    """
    options = EngineOptions(**engine)
    config = ModelConfig.from_dir(model)
    shape = _shape(config, options, ranks)
    speed = _speed(prompt_speed, output_speed, metrics, shape.instances)
    pool, host_blocks = shape.pool, (options.host_kv_memory or 0) // shape.block_bytes
    beside = host_blocks * pool.block_size
    limits = Limits(
        max_model_len=config.longest(max_model_len),
        capacity_tokens=None if pool.tokens is None else pool.tokens * shape.instances + beside,
        model_tokens=config.max_position,
    )
    defaults = SamplingDefaults(max_tokens=max_tokens)
    service = Service.from_dir(model, config, limits, defaults)
    report = ValidationReport(limits, shape)
    check_rows(source, service, report, table)
    for line in report.lines(speed):
        click.echo(printable(line))
    memory = rank_memory(config, options, instances=shape.instances, rows=report.good)
    memory = memory._replace(kv=report.sizing.pool_bytes)
    click.echo(f"memory        on CPUs the first rank needs {memory.words()}")
    raise SystemExit(1 if report.bad else 0)


def _shape(config: ModelConfig, options: EngineOptions, ranks: int | None) -> JobShape:
    """Of the job. Raises UsageError, ModelError and OptionError."""
    lanes = options.tensor_parallel_size
    if (ranks or lanes) % lanes:
        raise click.UsageError(
            f"--ranks {ranks} is no multiple of --tensor-parallel-size {lanes}: give one that is."
        )
    dtype = dtype_of(config, options)
    block_bytes = options.block_size * config.shard(lanes).kv_bytes_per_token(dtype)
    wanted = wanted_bytes(options, block_bytes)
    pool = Pool(options.block_size, wanted and wanted // block_bytes)
    return JobShape(pool, block_bytes, (ranks or lanes) // lanes, options.max_num_seqs)


def _speed(
    prompt: float | None, output: float | None, metrics: str | None, instances: int
) -> AssumedSpeed | MeasuredSpeed | None:
    """What is known of it. Raises UsageError, RunFileError and InputError."""
    if metrics is not None:
        if prompt or output:
            raise click.UsageError("--metrics has the speed already: give no tokens per second.")
        return MeasuredSpeed.of(read_run([Path(metrics)]).metrics, instances)
    if (prompt is None) != (output is None):
        raise click.UsageError(
            "--prompt-tokens-per-second and --output-tokens-per-second go together."
        )
    return AssumedSpeed(prompt, output) if prompt and output else None
