"""`hpc-distkv bench`: figures of this machine, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.options import POSITIVE, engine_options

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.engine.rank import EngineOptions
    from hpc_distkv.model.decoder import Decoder

Measure = Callable[["Comm", "Decoder", "EngineOptions"], dict[str, Any]]


@click.group("bench")
def command() -> None:
    """Measure with synthetic token ids; prints JSON. Run under mpirun or srun for several ranks."""


def _measured(options: dict[str, Any], measure: Measure) -> None:
    from hpc_distkv.cli.job import in_world, set_options

    def work(comm: Comm) -> int:
        from hpc_distkv.api import together
        from hpc_distkv.engine.rank import load_model

        engine_settings = set_options(options)
        model = together(comm, lambda: load_model(comm, options["model"], engine_settings))
        figures = measure(comm, model, engine_settings)
        if comm.world.rank == 0:
            click.echo(json.dumps({"ranks": comm.world.size, **figures}, indent=2))
        return 0

    in_world(options["stall_timeout"], work)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--input-len", type=POSITIVE, default=256, show_default=True)
@click.option("--output-len", type=POSITIVE, default=128, show_default=True)
@click.option("--num-prompts", type=POSITIVE, default=32, show_default=True)
@click.option(
    "--against-transformers",
    is_flag=True,
    help="Also run transformers' static-batch generate on the same cores, and give the ratio.",
)
@engine_options
def throughput(**options: Any) -> None:
    """Tokens per second, time to first token and peak memory."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.api import SetupError
        from hpc_distkv.observe import bench

        if options["against_transformers"] and comm.world.size > 1:
            raise SetupError("--against-transformers compares one rank: run without mpirun")
        requests = bench.synthetic(
            options["num_prompts"],
            options["input_len"],
            options["output_len"],
            model.config.vocab_size,
        )
        figures = bench.throughput(comm, model, settings, requests)
        if options["against_transformers"]:
            import torch

            dtype = str(model.dtype).removeprefix("torch.")
            other = bench.transformers_throughput(
                options["model"], dtype, torch.get_num_threads(), requests
            )
            rate = "output_tokens_per_second"
            figures |= {"transformers": other, "ratio": figures[rate] / other[rate]}
        return figures

    _measured(options, measure)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--context", type=POSITIVE, default=8000, show_default=True, help="Prompt tokens.")
@click.option("--output-len", type=POSITIVE, default=64, show_default=True)
@click.option("--repeats", type=POSITIVE, default=3, show_default=True)
@engine_options
def remote(**options: Any) -> None:
    """Two ranks: a long decode with half of its KV remote, against all of it at home."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.api import SetupError
        from hpc_distkv.observe import bench

        if comm.world.size != 2:
            raise SetupError(
                "this benchmark needs two ranks: mpirun -n 2 hpc-distkv bench remote …"
            )
        return bench.remote_against_local(
            comm, model, settings, options["context"], options["output_len"], options["repeats"]
        )

    _measured(options, measure)


@command.command("unused-lending")
@click.option("--model", required=True, help="Model directory.")
@click.option("--input-len", type=POSITIVE, default=128, show_default=True)
@click.option("--output-len", type=POSITIVE, default=64, show_default=True)
@click.option("--num-prompts", type=POSITIVE, default=16, show_default=True)
@click.option("--repeats", type=POSITIVE, default=5, show_default=True)
@engine_options
def unused_lending(**options: Any) -> None:
    """An even load that fits: what it costs that ranks could lend, against every rank alone."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.observe import bench

        requests = bench.synthetic(
            options["num_prompts"],
            options["input_len"],
            options["output_len"],
            model.config.vocab_size,
        )
        return bench.unused_lending(comm, model, settings, requests, options["repeats"])

    _measured(options, measure)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--trace", "traces", required=True, multiple=True, help="Trace: FILE.toml#NAME.")
@click.option("--rows", type=POSITIVE, help="Rows of each trace. [default: the trace's]")
@click.option("--scale", default=1.0, show_default=True, help="Divide all prompts by this.")
@click.option("--scale-output", type=float, help="Divide all outputs by this. [default: --scale]")
@click.option(
    "--against",
    default="lend,lend-greedy,migrate,queue,isolated",
    show_default=True,
    help="Policies in the order of their runs; ratios are to the last one.",
)
@click.option("--repeats", type=POSITIVE, default=1, show_default=True)
@engine_options
def policies(**options: Any) -> None:
    """The rows of a trace under every policy, on the same ranks."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.observe.policies import compare_policies
        from hpc_distkv.simulate.trace import Trace

        named = {name: name for name in options["against"].split(",")}
        results = {}
        for name in options["traces"]:
            trace = Trace.load(name)
            trace = trace.head(options["rows"]) if options["rows"] else trace
            trace = trace.scaled(options["scale"], options["scale_output"])
            requests = trace.requests(model.config.vocab_size)
            results[trace.name] = compare_policies(
                comm, model, settings, requests, named, options["repeats"]
            )
        return {"traces": results}

    _measured(options, measure)


@command.command()
@click.option(
    "--instances", multiple=True, type=POSITIVE, default=(32, 1_000, 10_000), show_default=True
)
@click.option("--rounds", "count", type=POSITIVE, default=50, show_default=True)
def rounds(instances: tuple[int, ...], count: int) -> None:
    """The gManager alone: time and bytes of a control round, by number of instances."""
    from hpc_distkv.observe.rounds import round_times

    figures = [round_times(number, count) for number in instances]
    click.echo(json.dumps(figures, indent=2))
