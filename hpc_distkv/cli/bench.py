"""`hpc-distkv bench`: figures of this machine, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
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
    help="Ways in the order of their runs: policies, no-dgfm, no-planner, budget-N (KV tokens "
    "moved per step). Ratios are to the last one.",
)
@click.option("--repeats", type=POSITIVE, default=1, show_default=True)
@click.option("-o", "--output", type=click.Path(file_okay=False), help="Folder for JSON and plots.")
@engine_options
def policies(**options: Any) -> None:
    """The rows of traces under every policy, on the same ranks, and what the simulator says."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.api import together
        from hpc_distkv.observe.policies import compare, draw, way
        from hpc_distkv.simulate.trace import Trace

        def prepared() -> tuple[dict[str, EngineOptions], list[Trace]]:
            names = options["against"].split(",")
            traces = [Trace.load(name) for name in options["traces"]]
            traces = [t.head(options["rows"]) if options["rows"] else t for t in traces]
            scaled = [t.scaled(options["scale"], options["scale_output"]) for t in traces]
            return {name: way(name, settings) for name in names}, scaled

        ways, traces = together(comm, prepared)
        results = {
            trace.name: compare(
                comm, model, ways, trace.requests(model.config.vocab_size), options["repeats"]
            )
            for trace in traces
        }
        figures = {"ways": list(ways), "traces": results}
        if comm.world.rank == 0 and options["output"]:
            folder = Path(options["output"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "policies.json").write_text(json.dumps(figures, indent=2) + "\n")
            draw(folder, results)
        return figures

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
