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
    F,
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

Measure = Callable[["Comm", "Decoder", "EngineOptions"], dict[str, Any]]


def workload(**counts: int) -> Callable[[F], F]:
    """Adds the options of a model, of `counts`, which are positive numbers, with their defaults,
    and of an engine."""
    meant = {"context": "Prompt tokens."}
    return added(
        MODEL,
        *(
            click.option(
                f"--{name.replace('_', '-')}",
                type=POSITIVE,
                default=count,
                show_default=True,
                help=meant.get(name),
            )
            for name, count in counts.items()
        ),
        engine_options,
    )


def requests_of(options: dict[str, Any], model: Decoder) -> list[Request]:
    """As many and as long as --num-prompts, --input-len and --output-len say."""
    from hpc_distkv.bench.runs import synthetic

    count, input_len = options["num_prompts"], options["input_len"]
    return synthetic(count, input_len, options["output_len"], model.config.vocab_size)


def measured(options: dict[str, Any], measure: Measure) -> None:
    """Load the model on all ranks, and print what `measure` finds."""
    from hpc_distkv.cli.job import in_world, set_options

    def work(comm: Comm) -> int:
        from hpc_distkv.comm.together import together
        from hpc_distkv.model.config import ModelConfig
        from hpc_distkv.start.loading import open_model

        settings, path = set_options(comm, options), options["model"]
        config = together(comm, lambda: ModelConfig.from_dir(path, settings.dummy))
        figures = measure(comm, open_model(comm, path, config, settings), settings)
        if comm.world.rank == 0:
            click.echo(json.dumps({"ranks": comm.world.size, **figures}, indent=2))
        return 0

    in_world(options["stall_timeout"], work)


def _require(holds: Any, otherwise: str) -> None:
    """Raise SetupError with the text `otherwise` on all ranks."""
    from hpc_distkv.comm.together import SetupError

    if not holds:
        raise SetupError(otherwise)


@click.group("bench")
def command() -> None:
    """Measure with synthetic token ids; prints JSON. Run under mpirun or srun for several ranks."""


@command.command()
@click.option(
    "--against-transformers",
    is_flag=True,
    help="Also run transformers' static-batch generate on the same device, and give the ratio.",
)
@workload(input_len=256, output_len=128, num_prompts=32)
def throughput(**options: Any) -> None:
    """Tokens per second, time to first token and peak memory."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
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

    measured(options, measure)


@command.command()
@workload(context=8000, output_len=64, repeats=3)
def remote(**options: Any) -> None:
    """Two ranks: a long decode with half of its KV remote, against all of it at home."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.lending import remote_against_local

        _require(
            comm.world.instances == 2 and comm.world.tp == 1,
            "this benchmark needs two ranks: mpirun -n 2 hpc-distkv bench remote …",
        )
        return remote_against_local(
            comm, model, settings, options["context"], options["output_len"], options["repeats"]
        )

    measured(options, measure)


@command.command()
@workload(input_len=512, output_len=64, num_prompts=64)
def gpu(**options: Any) -> None:
    """One rank on a GPU: waits and copies of a step, and how busy the GPU is."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
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

    measured(options, measure)


@command.command()
@workload(context=4000, output_len=64)
def overlap(**options: Any) -> None:
    """Two ranks: how much of an exchange is hidden behind what its debtor computes."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.overlap import exchange_overlap

        _require(
            comm.world.instances == 2,
            "this benchmark needs two instances: mpirun -n 2 hpc-distkv bench overlap …",
        )
        figures = exchange_overlap(comm, model, settings, options["context"], options["output_len"])
        _require(figures["exchanges"], "nothing was lent: give --policy lend and no --lend-cap")
        return figures

    measured(options, measure)


@command.command("unused-lending")
@workload(input_len=128, output_len=64, num_prompts=16, repeats=5)
def unused_lending(**options: Any) -> None:
    """An even load that fits: what it costs that ranks could lend, against every rank alone."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.lending import lending_against_alone

        _require(
            comm.world.tp == 1, "this benchmark runs ranks alone: --tensor-parallel-size must be 1"
        )
        requests = requests_of(options, model)
        return lending_against_alone(comm, model, settings, requests, options["repeats"])

    measured(options, measure)


@command.command("trace-cost")
@click.option("--long-len", type=POSITIVE, help="Prompt tokens of one row more.")
@workload(input_len=128, output_len=48, num_prompts=8, repeats=8)
def trace_cost(**options: Any) -> None:
    """The same rows with --trace and without it."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.runs import synthetic
        from hpc_distkv.bench.trace_cost import traced_against_plain

        count, output_len = options["num_prompts"], options["output_len"]
        vocab_size = model.config.vocab_size
        requests = requests_of(options, model)
        if options["long_len"]:
            *_, long = synthetic(count + 1, options["long_len"], output_len, vocab_size)
            requests.append(long)
        return traced_against_plain(comm, model, settings, requests, options["repeats"])

    measured(options, measure)


@command.command()
@workload(document_len=3000, question_len=40, output_len=16, rows=64, repeats=1)
def prefix(**options: Any) -> None:
    """Rows with a document in common and different questions: prefix caching on against off."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.prefixes import questions, sharing

        rows, document, question = (options[n] for n in ("rows", "document_len", "question_len"))
        requests = questions(
            rows, document, question, options["output_len"], model.config.vocab_size
        )
        distinct = document + rows * question
        return sharing(comm, model, settings, requests, distinct, options["repeats"])

    measured(options, measure)


@command.command()
@MODEL
@click.option("--trace", "traces", required=True, multiple=True, help="Trace: FILE.toml#NAME.")
@trace_options
@click.option(
    "--against",
    default="lend,lend-greedy,migrate,queue,isolated",
    show_default=True,
    help="Ways in the order of their runs: policies, no-dgfm, no-planner, budget-N (KV tokens "
    "moved per step), tensor-parallel (one instance of all ranks). Ratios are to the last one.",
)
@click.option("--repeats", type=POSITIVE, default=1, show_default=True)
@FOLDER
@engine_options
def policies(**options: Any) -> None:
    """The rows of traces under every policy, on the same ranks, and what the simulator says."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
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

    measured(options, measure)


for other in (kernels, draws, host, rounds, paper, scale):
    command.add_command(other)
