"""`hpc-distkv generate`: answer a batch file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.batch.schema import SEEDS
from hpc_distkv.cli.options import POSITIVE, Number, engine_options, read_shard
from hpc_distkv.engine.interrupt import GRACE, TERM_GRACE, Interrupt

if TYPE_CHECKING:
    from hpc_distkv.api import Engine
    from hpc_distkv.batch.files import Claims, Files
    from hpc_distkv.comm.transport import Comm

STOPPED_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: to be tried again."""

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_tokens", "seed"),
)
SEEING = ("metrics", "prometheus", "trace")


@click.command("generate")
@click.option("--model", required=True, help="Model directory.")
@click.option("-i", "--input", "source", required=True, help="Batch file (OpenAI JSONL).")
@click.option("-o", "--output", required=True, help="Results file; a rerun resumes it.")
@click.option("--overwrite", is_flag=True, help="Drop the answers that the results file holds.")
@click.option("--retry-errors", is_flag=True, help="Answer the rows again that are error rows.")
@click.option("--error-file", help="Where error rows go. [default: among the results]")
@click.option(
    "--ordered", is_flag=True, help="Put the results into the order of the input at the end."
)
@click.option(
    "--shard",
    metavar="i/n",
    callback=read_shard,
    help="Answer one of n parts of the input, i = 1 to n, each with a results file of its own.",
)
@click.option(
    "--grace",
    type=Number(min=0),
    default=GRACE,
    show_default=True,
    help="Seconds after SIGUSR2 in which rows that run may finish; then they are put aside for the "
    f"rerun. After SIGTERM {TERM_GRACE:g} at most.",
)
@click.option(
    "--max-model-len",
    type=POSITIVE,
    help="Longest prompt and output together, in tokens. [default: the model's]",
)
@click.option("--max-tokens", type=POSITIVE, help="Output tokens of rows that give no number.")
@click.option(
    "--temperature",
    type=Number(0, 2),
    help="For rows that give none; 0 is greedy. [default: the model's]",
)
@click.option("--top-p", type=Number(0, 1, min_open=True), help="Likewise.")
@click.option("--top-k", type=click.IntRange(min=0), help="Likewise; 0: no limit.")
@click.option("--min-p", type=Number(0, 1), help="Likewise.")
@click.option("--repetition-penalty", type=Number(0, 1000, min_open=True), help="Likewise.")
@click.option(
    "--seed",
    type=click.IntRange(*SEEDS),
    default=0,
    show_default=True,
    help="For rows that give none.",
)
@click.option(
    "--metrics", type=click.Path(dir_okay=False), help="Write the run's figures at the end (JSON)."
)
@click.option(
    "--prometheus",
    type=click.Path(dir_okay=False),
    help="Write the state every 10 s for the node exporter's textfile collector (FILE.prom).",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    help="Write when which rank did what, for https://ui.perfetto.dev (FILE.json or .json.gz).",
)
@engine_options
@click.pass_obj
def command(arrived: Iterable[int] | None, /, **options: Any) -> None:
    """Answer every row of a batch file, once, on all ranks of the job.

    Start it under srun or mpirun, or alone. Run the same command again after an interruption: it
    goes on where it was. On SIGUSR2 or SIGTERM it stops in time and keeps what it has begun.

    Exit status: 0 all rows answered, 1 some rows are errors, 2 usage, 75 stopped early: to be
    started again.
    """
    interrupt = Interrupt(options["grace"]).listen(arrived or ())
    from hpc_distkv.cli.job import in_world

    in_world(options["stall_timeout"], lambda comm: _generate(comm, options, interrupt))


def _generate(comm: Comm, options: dict[str, Any], interrupt: Interrupt) -> int:
    from hpc_distkv.comm.together import together

    paths = {n: Path(options[n]) if options[n] else None for n in SEEING}
    files = _files(options, paths)
    first = comm.world.rank == 0
    claims = together(comm, lambda: _claim(files, paths, options["model"]) if first else None)
    try:
        return _run(comm, files, options, interrupt, claims)
    finally:
        if claims:
            claims.release()


def _run(
    comm: Comm,
    files: Files,
    options: dict[str, Any],
    interrupt: Interrupt,
    claims: Claims | None,
) -> int:
    from hpc_distkv.api import Engine
    from hpc_distkv.cli.job import say, set_options
    from hpc_distkv.observe.metrics import write_json
    from hpc_distkv.observe.progress import ProgressReport

    if any(comm.share(interrupt.drain)):
        say(comm, "stopped before the model was read: run the same command again")
        return STOPPED_STATUS
    engine = Engine(
        options["model"],
        set_options(comm, options),
        sampling={n: options[n] for n in SAMPLING if options[n] is not None},
        max_model_len=options["max_model_len"],
        comm=comm,
    )
    say(comm, _announcement(engine))
    progress = ProgressReport() if comm.world.rank == 0 else None
    figures = engine.run(files, progress, interrupt=interrupt, claims=claims)
    if figures is None:
        return 0
    if options["metrics"]:
        try:
            write_json(Path(options["metrics"]), figures)
        except OSError as error:  # the answers are there all the same
            say(comm, f"cannot write the metrics: {error}")
    click.echo(_summary(figures, files.output))
    rows = figures["rows"]
    if figures["stopped"]:
        return STOPPED_STATUS
    return 1 if rows["failed"] + rows["failed_before"] else 0


def _files(options: dict[str, Any], paths: dict[str, Path | None]) -> Files:
    from hpc_distkv.batch.files import Files

    return Files(
        Path(options["source"]),
        Path(options["output"]),
        overwrite=options["overwrite"],
        retry_errors=options["retry_errors"],
        errors=Path(options["error_file"]) if options["error_file"] else None,
        shard=options["shard"],
        ordered=options["ordered"],
        job=os.environ.get("SLURM_JOB_ID"),
        restarted=os.environ.get("SLURM_RESTART_COUNT", "0") != "0",
        prometheus=paths["prometheus"],
        trace=paths["trace"],
    )


def _claim(files: Files, seeing: dict[str, Path | None], model: str) -> Claims:
    """Look at the files before the model is loaded, and claim those to be written. Raises
    InputError, JournalError and OptionError."""
    from hpc_distkv.batch.replace import check_replaceable, real_path
    from hpc_distkv.engine.config import OptionError

    taken = {os.path.realpath(path) for path in (files.input, files.output, files.errors) if path}
    for name, path in seeing.items():
        if path is None:
            continue
        folder = real_path(path).absolute().parent
        if not os.access(folder, os.W_OK):
            raise OptionError(f"cannot write --{name} {path}: {folder} is no directory to write in")
        try:
            check_replaceable(path)
        except OSError as error:
            raise OptionError(f"cannot write --{name} {path}: {error.strerror}") from error
        if os.path.realpath(path) in taken:
            raise OptionError(f"--{name} {path} is a file of this job: give another file")
        if os.path.realpath(model) in map(os.path.realpath, (path.parent, folder)):
            raise OptionError(f"--{name} {path} is in the model's directory: give another place")
        taken.add(os.path.realpath(path))
    trace = seeing["trace"]
    if trace and not trace.name.endswith((".json", ".json.gz")):
        raise OptionError(f"--trace {trace}: it is written as .json or .json.gz")
    if seeing["prometheus"] and seeing["prometheus"].suffix != ".prom":
        raise OptionError(
            f"--prometheus {seeing['prometheus']}: the node exporter reads *.prom files only"
        )
    return files.claim()


def _announcement(engine: Engine) -> str:
    defaults, rank, world = engine.defaults, engine.rank, engine.comm.world
    lending = f"one row may have {rank.capacity_tokens} tokens of KV"
    if world.instances > 1:
        lending += ", lent between ranks" if rank.config.policy.lending else ", nothing is lent"
    host = rank.config.host_blocks
    beside = f", {host} more in the memory of its host" if host else ""
    sampling = f"temperature {defaults.temperature:g}" if defaults.temperature else "greedy"
    ranks = f"{world.size} ranks"
    if world.tp > 1:
        ranks += f" in {world.instances} instances of {world.tp}"
    return (
        f"{ranks}, {rank.processor} each; {rank.dtype}; "
        f"{rank.config.num_blocks} rBlocks of {rank.config.block_size} tokens a rank"
        f"{beside}: {lending}\n"
        "for what a row leaves out, from the options or the model's generation_config.json: "
        f"{sampling}, top_p {defaults.top_p:g}, "
        f"top_k {defaults.top_k or 'off'}, min_p {defaults.min_p:g}, repetition_penalty "
        f"{defaults.repetition_penalty:g}, max_tokens {defaults.max_tokens or 'up to the limit'}, "
        f"seed {defaults.seed}"
    )


def _sharing(counters: dict[str, Any]) -> list[str]:
    if not counters["cached_tokens"]:
        return []
    return [
        f"prompts   {counters['prompt_tokens']:.0f} tokens computed, "
        f"{counters['cached_tokens']:.0f} taken from rows that began alike"
    ]


def _host(counters: dict[str, Any]) -> list[str]:
    if not counters["blocks_to_host"]:
        return []
    return [
        f"host      {counters['blocks_to_host']:.0f} rBlocks to its memory and "
        f"{counters['blocks_from_host']:.0f} back, at most {counters['peak_host']:.0f} there at "
        "once by one rank"
    ]


def _summary(figures: dict[str, Any], output: Path) -> str:
    rows, counters = figures["rows"], figures["counters"]
    before = rows["answered_before"] + rows["failed_before"]
    lines = [
        f"rows      {rows['answered']} answered, {rows['failed']} errors"
        + (f", {before} were there before" if before else ""),
        f"time      {figures['seconds']:.1f} s, {figures['output_tokens_per_second']:.1f} output "
        f"tokens/s, {figures['tokens_per_second']:.1f} tokens/s with prompts",
        *_sharing(counters),
        f"memory    {counters['blocks_borrowed']:.0f} rBlocks lent and borrowed between ranks, "
        f"at most {counters['peak_borrowed']:.0f} by one rank at once; "
        f"{counters['preemptions']:.0f} preemptions",
        *_host(counters),
        f"results   {output}",
    ]
    if figures["stopped"]:
        lines.append(
            f"stopped   before all rows were answered; {rows['put_aside']} rows with "
            f"{figures['put_aside_tokens']} output tokens are put aside: run the same command again"
        )
    return "\n".join(lines)
