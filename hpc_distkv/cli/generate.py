"""`hpc-distkv generate`: answer a batch file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.batch.input.body import SEEDS
from hpc_distkv.cli.options import INPUT, LENGTHS, MODEL, Number, engine_options, read_shard
from hpc_distkv.errors import STOPPED_STATUS, FaultError
from hpc_distkv.ranks.interrupt import GRACE, TERM_GRACE, Interrupt

if TYPE_CHECKING:
    from hpc_distkv.batch.results.files import Claims, Files
    from hpc_distkv.comm.transport import Comm

ENDS = {
    0: "all rows are answered",
    1: "all rows are done, and some are errors",
    STOPPED_STATUS: "rows are left, to be answered by the same command",
    FaultError.exit_code: "the input ends within a line",
}

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_tokens", "seed"),
)
OF_FILES = ("overwrite", "retry_errors", "retry_changed", "shard", "ordered")
"""Options that `Files` has under the same names."""
SEEING = ("metrics", "prometheus", "trace")


@click.command("generate")
@MODEL
@INPUT
@click.option("-o", "--output", required=True, help="Results file; a rerun resumes it.")
@click.option("--overwrite", is_flag=True, help="Drop the answers that the results file holds.")
@click.option("--retry-errors", is_flag=True, help="Answer the rows again that are error rows.")
@click.option(
    "--retry-changed",
    is_flag=True,
    help="Answer the rows again that were edited since they were answered.",
)
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
    help="Seconds after SIGUSR2 in which rows that run may finish; then they are saved for the "
    f"rerun. After SIGTERM {TERM_GRACE:g} at most.",
)
@LENGTHS
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
    "--metrics",
    type=click.Path(dir_okay=False),
    help="Write the run's figures at the end (JSON). Those of earlier runs of the job get a "
    "number: metrics.1.json is the first.",
)
@click.option(
    "--prometheus",
    type=click.Path(dir_okay=False),
    help="Write the state every 10 s for the node exporter's textfile collector (FILE.prom).",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    help="Write when which rank did what, for https://ui.perfetto.dev (FILE.json or .json.gz); "
    "likewise.",
)
@engine_options
@click.pass_obj
def command(arrived: Iterable[int] | None, /, **options: Any) -> None:
    """Answer every row of a batch file, once, on all ranks of the job.

    Start it under srun or mpirun, or alone. Run the same command again after an interruption: it
    goes on where it was. On SIGUSR2 or SIGTERM it stops in time and keeps what it has begun.

    Exit status: 0 all rows answered, 1 some rows are errors, 2 usage, 70 a fault, also where the
    input ends within a line, 75 stopped early, or the input was changed meanwhile: to be started
    again.
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
    from hpc_distkv.cli import announce
    from hpc_distkv.cli.job import say, set_options
    from hpc_distkv.observe.live.progress import ProgressReport
    from hpc_distkv.observe.summary.earlier import write_anew
    from hpc_distkv.observe.summary.metrics import write_json
    from hpc_distkv.units import stamped

    say(comm, announce.header(comm.world, files))
    if any(comm.share(interrupt.drain)):
        say(comm, stamped("stopped before the model was read: run the same command again"))
        return STOPPED_STATUS
    engine = Engine(
        options["model"],
        set_options(comm, options),
        sampling={n: options[n] for n in SAMPLING if options[n] is not None},
        max_model_len=options["max_model_len"],
        comm=comm,
    )
    for line in announce.loaded(engine):
        say(comm, stamped(line))
    progress = ProgressReport() if comm.world.rank == 0 else None
    figures = engine.run(files, progress, interrupt=interrupt, claims=claims)
    if figures is None:
        return 0
    if options["metrics"]:
        path, about = Path(options["metrics"]), figures["job"]
        write_anew(path, about, "metrics", lambda path: write_json(path, figures))
    click.echo(announce.summary(figures, files.output))
    status = _status(figures)
    say(comm, stamped(f"this run ends with status {status}: {ENDS[status]}"))
    return status


def _status(figures: dict[str, Any]) -> int:
    if figures["input_torn"]:
        return FaultError.exit_code
    if figures["stopped"]:
        return STOPPED_STATUS
    return 1 if figures["request_counts"]["failed"] else 0


def _files(options: dict[str, Any], paths: dict[str, Path | None]) -> Files:
    from hpc_distkv.batch.results.files import Files

    return Files(
        Path(options["source"]),
        Path(options["output"]),
        prometheus=paths["prometheus"],
        trace=paths["trace"],
        errors=Path(options["error_file"]) if options["error_file"] else None,
        job=os.environ.get("SLURM_JOB_ID"),
        restarted=os.environ.get("SLURM_RESTART_COUNT", "0") != "0",
        **{name: options[name] for name in OF_FILES},
    )


def _claim(files: Files, seeing: dict[str, Path | None], model: str) -> Claims:
    """Look at the files before the model is loaded, and claim those to be written. Raises
    InputError, JournalError and OptionError."""
    from hpc_distkv.errors import OptionError
    from hpc_distkv.regular import check_replaceable, real_path

    taken = set()
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
        if os.path.realpath(path) in taken or files.hold(path):
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
