"""`hpc-distkv bench`: figures of this machine, as JSON."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.bench_simulated import host, paper, rounds, scale
from hpc_distkv.cli.measured import MODEL, measured, requests_of, workload
from hpc_distkv.cli.options import POSITIVE, engine_options
from hpc_distkv.cli.traces import load_trace, trace_options

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.control.messages import Request
    from hpc_distkv.engine.options import EngineOptions
    from hpc_distkv.model.decoder import Decoder


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
        from hpc_distkv.comm.together import SetupError
        from hpc_distkv.observe import bench

        if options["against_transformers"] and comm.world.size > 1:
            raise SetupError("--against-transformers compares one rank: run without mpirun")
        requests = requests_of(options, model)
        figures = bench.throughput(comm, model, settings, requests)
        if options["against_transformers"]:
            import torch

            other = bench.transformers_throughput(
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
        from hpc_distkv.comm.together import SetupError
        from hpc_distkv.observe import bench

        if comm.world.instances != 2 or comm.world.tp > 1:
            raise SetupError(
                "this benchmark needs two ranks: mpirun -n 2 hpc-distkv bench remote …"
            )
        return bench.remote_against_local(
            comm, model, settings, options["context"], options["output_len"], options["repeats"]
        )

    measured(options, measure)


@command.command()
@workload(input_len=512, output_len=64, num_prompts=64)
def gpu(**options: Any) -> None:
    """One rank on a GPU: waits and copies of a step, and how busy the GPU is."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.comm.together import SetupError
        from hpc_distkv.engine.rank import joined
        from hpc_distkv.observe import bench
        from hpc_distkv.observe.gpu import profile_steps

        if comm.world.size > 1:
            raise SetupError("this benchmark profiles one rank: run without mpirun")
        if comm.device.place.type == "cpu":
            raise SetupError("this benchmark profiles a GPU: run it on a node that has one")
        requests = requests_of(options, model)
        engine = joined(comm, model, settings)
        bench.run_once(engine, requests)
        return profile_steps(engine, requests)

    measured(options, measure)


@command.command()
@workload(context=4000, output_len=64)
def overlap(**options: Any) -> None:
    """Two ranks: how much of an exchange is hidden behind what its debtor computes."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.comm.together import SetupError
        from hpc_distkv.observe.overlap import exchange_overlap

        if comm.world.instances != 2:
            raise SetupError(
                "this benchmark needs two instances: mpirun -n 2 hpc-distkv bench overlap …"
            )
        figures = exchange_overlap(comm, model, settings, options["context"], options["output_len"])
        if not figures["exchanges"]:
            raise SetupError("nothing was lent: give --policy lend and no --lend-cap")
        return figures

    measured(options, measure)


@command.command("unused-lending")
@workload(input_len=128, output_len=64, num_prompts=16, repeats=5)
def unused_lending(**options: Any) -> None:
    """An even load that fits: what it costs that ranks could lend, against every rank alone."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.comm.together import SetupError
        from hpc_distkv.observe import bench

        if comm.world.tp > 1:
            raise SetupError("this benchmark runs ranks alone: --tensor-parallel-size must be 1")
        requests = requests_of(options, model)
        return bench.unused_lending(comm, model, settings, requests, options["repeats"])

    measured(options, measure)


@command.command("trace-cost")
@click.option("--long-len", type=POSITIVE, help="Prompt tokens of one row more.")
@workload(input_len=128, output_len=48, num_prompts=8, repeats=8)
def trace_cost(**options: Any) -> None:
    """The same rows with --trace and without it."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.observe import bench

        count, output_len = options["num_prompts"], options["output_len"]
        vocab_size = model.config.vocab_size
        requests = requests_of(options, model)
        if options["long_len"]:
            *_, long = bench.synthetic(count + 1, options["long_len"], output_len, vocab_size)
            requests.append(long)
        return bench.trace_cost(comm, model, settings, requests, options["repeats"])

    measured(options, measure)


@command.command()
@workload(document_len=3000, question_len=40, output_len=16, rows=64, repeats=1)
def prefix(**options: Any) -> None:
    """Rows with a document in common and different questions: prefix caching on against off."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.observe.prefixes import questions, sharing

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
@click.option("-o", "--output", type=click.Path(file_okay=False), help="Folder for JSON and plots.")
@engine_options
def policies(**options: Any) -> None:
    """The rows of traces under every policy, on the same ranks, and what the simulator says."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.comm.together import SetupError, together
        from hpc_distkv.observe.metrics import write_json
        from hpc_distkv.observe.plots import plot_folder
        from hpc_distkv.observe.policies import check_fit, compare, draw, engines_of

        if comm.world.tp > 1:
            raise SetupError("give tensor-parallel in --against: --tensor-parallel-size must be 1")

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


@command.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, … or cpu.")
@click.option("--length", "lengths", multiple=True, type=POSITIVE, help="Tokens of decoded rows.")
@click.option("--batch", "batches", multiple=True, type=POSITIVE, help="Rows decoded together.")
@click.option("--most-tokens", type=POSITIVE, default=4_194_304, show_default=True)
@click.option("--block-size", type=POSITIVE, default=32, show_default=True)
def kernels(
    device: str,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    most_tokens: int,
    block_size: int,
) -> None:
    """Attention kernels alone, with the heads of Llama 3 8B: bandwidth of decodes against that of a
    copy, operations per second of prompts, errors against float64, and torch's attention."""
    import torch

    from hpc_distkv.observe import kernels as bench

    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise click.BadParameter(f"{device}: {reason}", param_hint="--device") from error
    prompts = tuple(
        (rows, queries, tokens)
        for rows, queries, tokens in bench.PROMPTS
        if rows * tokens <= most_tokens
    )
    figures = bench.kernel_figures(
        where, lengths or bench.LENGTHS, batches or bench.BATCHES, prompts, most_tokens, block_size
    )
    click.echo(json.dumps(figures, indent=2))


for simulated in (host, rounds, paper, scale):
    command.add_command(simulated)
