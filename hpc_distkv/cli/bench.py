"""`hpc-distkv bench`: figures of this machine, as JSON. Those that need no ranks are in
`bench_alone`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.bench_alone import draws, host, kernels, paper, rounds, scale
from hpc_distkv.cli.options import (
    FOLDER,
    MODEL,
    POSITIVE,
    added,
    engine_options,
    load_trace,
    trace_options,
)

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.control.messages.requests import Request
    from hpc_distkv.model.decoder import Decoder
    from hpc_distkv.start.options import EngineOptions

Options = dict[str, Any]
Figures = dict[str, Any]
Measure = Callable[["Comm", "Decoder", "EngineOptions", Options], Figures]


@click.group("bench")
def command() -> None:
    """Measure with synthetic token ids; prints JSON. Run under mpirun or srun for several ranks."""


def benchmark(*own: Callable[[Any], Any], **counts: int) -> Callable[[Measure], None]:
    """Makes a function a command on all ranks, which loads a model and prints the figures that the
    function finds. Options are those of a model and an engine, `own` ones, and `counts`: positive
    numbers with their defaults."""
    meant = {"context": "Prompt tokens."}
    numbers = [
        click.option(
            f"--{name.replace('_', '-')}",
            type=POSITIVE,
            default=count,
            show_default=True,
            help=meant.get(name),
        )
        for name, count in counts.items()
    ]

    def register(measure: Measure) -> None:
        @command.command(measure.__name__.replace("_", "-"), help=measure.__doc__)
        @added(MODEL, *own, *numbers, engine_options)
        def run(**options: Any) -> None:
            from hpc_distkv.cli.job import in_world

            in_world(options["stall_timeout"], lambda comm: _measured(comm, measure, options))

    return register


def _measured(comm: Comm, measure: Measure, options: dict[str, Any]) -> int:
    from hpc_distkv.cli.job import set_options
    from hpc_distkv.comm.together import together
    from hpc_distkv.model.config import ModelConfig
    from hpc_distkv.start.loading import open_model

    settings, path = set_options(comm, options), options["model"]
    config = together(comm, lambda: ModelConfig.from_dir(path, settings.dummy))
    figures = measure(comm, open_model(comm, path, config, settings), settings, options)
    if comm.world.rank == 0:
        click.echo(json.dumps({"ranks": comm.world.size, **figures}, indent=2))
    return 0


def requests_of(options: dict[str, Any], model: Decoder) -> list[Request]:
    """As many and as long as --num-prompts, --input-len and --output-len say."""
    from hpc_distkv.bench.runs import synthetic

    count, input_len = options["num_prompts"], options["input_len"]
    return synthetic(count, input_len, options["output_len"], model.config.vocab_size)


def _require(holds: Any, otherwise: str) -> None:
    """Raise SetupError with the text `otherwise` on all ranks."""
    from hpc_distkv.comm.together import SetupError

    if not holds:
        raise SetupError(otherwise)


@benchmark(
    click.option(
        "--against-transformers",
        is_flag=True,
        help="Also run transformers' static-batch generate on the same device, and give the ratio.",
    ),
    input_len=256,
    output_len=128,
    num_prompts=32,
)
def throughput(comm: Comm, model: Decoder, settings: EngineOptions, options: Options) -> Figures:
    """Tokens per second, time to first token and peak memory."""
    from hpc_distkv.bench.throughput import engine_throughput, transformers_throughput

    _require(
        not options["against_transformers"] or comm.world.size == 1,
        "--against-transformers compares one rank: run without mpirun",
    )
    requests = requests_of(options, model)
    figures = engine_throughput(comm, model, settings, requests)
    if options["against_transformers"]:
        import torch

        other = transformers_throughput(
            options["model"], model, torch.get_num_threads(), requests, settings.dummy
        )
        rate = "output_tokens_per_second"
        figures |= {"transformers": other, "ratio": figures[rate] / other[rate]}
    return figures


@benchmark(context=8000, output_len=64, repeats=3)
def remote(comm: Comm, model: Decoder, settings: EngineOptions, options: dict[str, Any]) -> Figures:
    """Two ranks: a long decode with half of its KV remote, against all of it at home."""
    from hpc_distkv.bench.lending import remote_against_local

    _require(
        comm.world.instances == 2 and comm.world.tp == 1,
        "this benchmark needs two ranks: mpirun -n 2 hpc-distkv bench remote …",
    )
    return remote_against_local(
        comm, model, settings, options["context"], options["output_len"], options["repeats"]
    )


@benchmark(input_len=512, output_len=64, num_prompts=64)
def gpu(comm: Comm, model: Decoder, settings: EngineOptions, options: dict[str, Any]) -> Figures:
    """One rank on a GPU: waits and copies of a step, and how busy the GPU is."""
    from hpc_distkv.bench.gpu import profile_steps
    from hpc_distkv.bench.runs import run_once
    from hpc_distkv.ranks.rank import joined

    _require(comm.world.size == 1, "this benchmark profiles one rank: run without mpirun")
    _require(
        comm.device.place.type != "cpu",
        "this benchmark profiles a GPU: run it on a node that has one",
    )
    requests = requests_of(options, model)
    engine = joined(comm, model, settings)
    run_once(engine, requests)
    return profile_steps(engine, requests)


@benchmark(context=4000, output_len=64)
def overlap(comm: Comm, model: Decoder, settings: EngineOptions, options: Options) -> Figures:
    """Two ranks: how much of an exchange is hidden behind what its debtor computes."""
    from hpc_distkv.bench.overlap import exchange_overlap

    _require(
        comm.world.instances == 2,
        "this benchmark needs two instances: mpirun -n 2 hpc-distkv bench overlap …",
    )
    figures = exchange_overlap(comm, model, settings, options["context"], options["output_len"])
    _require(figures["exchanges"], "nothing was lent: give --policy lend and no --lend-cap")
    return figures


@benchmark(input_len=128, output_len=64, num_prompts=16, repeats=5)
def unused_lending(
    comm: Comm, model: Decoder, settings: EngineOptions, options: Options
) -> Figures:
    """An even load that fits: what it costs that ranks could lend, against every rank alone."""
    from hpc_distkv.bench.lending import lending_against_alone

    _require(
        comm.world.tp == 1, "this benchmark runs ranks alone: --tensor-parallel-size must be 1"
    )
    requests = requests_of(options, model)
    return lending_against_alone(comm, model, settings, requests, options["repeats"])


@benchmark(
    click.option("--long-len", type=POSITIVE, help="Prompt tokens of one row more."),
    input_len=128,
    output_len=48,
    num_prompts=8,
    repeats=8,
)
def trace_cost(comm: Comm, model: Decoder, settings: EngineOptions, options: Options) -> Figures:
    """The same rows with --trace and without it."""
    from hpc_distkv.bench.runs import synthetic
    from hpc_distkv.bench.throughput import traced_against_plain

    count, output_len = options["num_prompts"], options["output_len"]
    vocab_size = model.config.vocab_size
    requests = requests_of(options, model)
    if options["long_len"]:
        *_, long = synthetic(count + 1, options["long_len"], output_len, vocab_size)
        requests.append(long)
    return traced_against_plain(comm, model, settings, requests, options["repeats"])


@benchmark(document_len=3000, question_len=40, output_len=16, rows=64, repeats=1)
def prefix(comm: Comm, model: Decoder, settings: EngineOptions, options: dict[str, Any]) -> Figures:
    """Rows with a document in common and different questions: prefix caching on against off."""
    from hpc_distkv.bench.prefixes import questions, sharing

    rows, document, question = (options[n] for n in ("rows", "document_len", "question_len"))
    requests = questions(rows, document, question, options["output_len"], model.config.vocab_size)
    distinct = document + rows * question
    return sharing(comm, model, settings, requests, distinct, options["repeats"])


@benchmark(
    click.option("--trace", "traces", required=True, multiple=True, help="Trace: FILE.toml#NAME."),
    trace_options,
    click.option(
        "--against",
        default="lend,lend-greedy,migrate,queue,isolated",
        show_default=True,
        help="Ways in the order of their runs: policies, no-dgfm, no-planner, budget-N (KV tokens "
        "moved per step), tensor-parallel (one instance of all ranks). Ratios are to the last one.",
    ),
    FOLDER,
    repeats=1,
)
def policies(comm: Comm, model: Decoder, settings: EngineOptions, options: Options) -> Figures:
    """The rows of traces under every policy, on the same ranks, and what the simulator says."""
    from hpc_distkv.bench.plots import plot_folder
    from hpc_distkv.bench.policies import check_fit, compare, draw, engines_of
    from hpc_distkv.comm.together import together
    from hpc_distkv.observe.summary.metrics import write_json

    _require(
        comm.world.tp == 1,
        "give tensor-parallel in --against: --tensor-parallel-size must be 1",
    )

    def load() -> dict[str, list[Request]]:
        traces = [load_trace(name, options) for name in options["traces"]]
        return {trace.name: trace.requests(model.config.vocab_size) for trace in traces}

    wanted = options["output"] if comm.world.rank == 0 else None
    folder = together(comm, lambda: plot_folder(wanted) if wanted else None)
    requests = together(comm, load)
    ways = options["against"].split(",")
    engines = engines_of(ways, comm, options["model"], model, settings)
    for rows in requests.values():
        together(comm, partial(check_fit, engines, rows))
    results = {
        name: compare(model.config, engines, rows, options["repeats"])
        for name, rows in requests.items()
    }
    figures = {"ways": list(engines), "traces": results}
    if folder:
        write_json(folder / "policies.json", figures)
        draw(folder, results)
    return figures


for other in (kernels, draws, host, rounds, paper, scale):
    command.add_command(other)
