"""`hpc-distkv bench`: figures of this machine, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.bench_simulated import host, paper, rounds, scale
from hpc_distkv.cli.options import POSITIVE, Number, engine_options

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.control.requests import Request
    from hpc_distkv.engine.options import EngineOptions
    from hpc_distkv.model.decoder import Decoder

Measure = Callable[["Comm", "Decoder", "EngineOptions"], dict[str, Any]]


@click.group("bench")
def command() -> None:
    """Measure with synthetic token ids; prints JSON. Run under mpirun or srun for several ranks."""


def _measured(options: dict[str, Any], measure: Measure) -> None:
    from hpc_distkv.cli.job import in_world, set_options

    def work(comm: Comm) -> int:
        from hpc_distkv.api import together
        from hpc_distkv.engine.rank import bind, load_model, unite
        from hpc_distkv.model.config import ModelConfig

        engine_settings = set_options(comm, options)
        together(comm, lambda: ModelConfig.from_dir(options["model"], engine_settings.dummy))
        together(comm, lambda: bind(comm, engine_settings))
        model = together(comm, lambda: load_model(comm, options["model"], engine_settings))
        unite(comm)
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
    help="Also run transformers' static-batch generate on the same device, and give the ratio.",
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

            other = bench.transformers_throughput(
                options["model"], model, torch.get_num_threads(), requests, settings.dummy
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

        if comm.world.instances != 2 or comm.world.tp > 1:
            raise SetupError(
                "this benchmark needs two ranks: mpirun -n 2 hpc-distkv bench remote …"
            )
        return bench.remote_against_local(
            comm, model, settings, options["context"], options["output_len"], options["repeats"]
        )

    _measured(options, measure)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--input-len", type=POSITIVE, default=512, show_default=True)
@click.option("--output-len", type=POSITIVE, default=64, show_default=True)
@click.option("--num-prompts", type=POSITIVE, default=64, show_default=True)
@engine_options
def gpu(**options: Any) -> None:
    """One rank on a GPU: waits and copies of a step, and how busy the GPU is."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.api import SetupError
        from hpc_distkv.engine.rank import RankEngine
        from hpc_distkv.observe import bench
        from hpc_distkv.observe.gpu import profile_steps

        if comm.world.size > 1:
            raise SetupError("this benchmark profiles one rank: run without mpirun")
        if comm.device.place.type == "cpu":
            raise SetupError("this benchmark profiles a GPU: run it on a node that has one")
        requests = bench.synthetic(
            options["num_prompts"],
            options["input_len"],
            options["output_len"],
            model.config.vocab_size,
        )
        engine = RankEngine(comm, model, settings)
        engine.join()
        bench.run_once(engine, requests)
        return profile_steps(engine, requests)

    _measured(options, measure)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--context", type=POSITIVE, default=4000, show_default=True, help="Prompt tokens.")
@click.option("--output-len", type=POSITIVE, default=64, show_default=True)
@engine_options
def overlap(**options: Any) -> None:
    """Two ranks: how much of an exchange is hidden behind what its debtor computes."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.api import SetupError
        from hpc_distkv.observe.overlap import exchange_overlap

        if comm.world.instances != 2:
            raise SetupError(
                "this benchmark needs two instances: mpirun -n 2 hpc-distkv bench overlap …"
            )
        figures = exchange_overlap(comm, model, settings, options["context"], options["output_len"])
        if not figures["exchanges"]:
            raise SetupError("nothing was lent: give --policy lend and no --lend-cap")
        return figures

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
        from hpc_distkv.api import SetupError
        from hpc_distkv.observe import bench

        if comm.world.tp > 1:
            raise SetupError("this benchmark runs ranks alone: --tensor-parallel-size must be 1")
        requests = bench.synthetic(
            options["num_prompts"],
            options["input_len"],
            options["output_len"],
            model.config.vocab_size,
        )
        return bench.unused_lending(comm, model, settings, requests, options["repeats"])

    _measured(options, measure)


@command.command("trace-cost")
@click.option("--model", required=True, help="Model directory.")
@click.option("--input-len", type=POSITIVE, default=128, show_default=True)
@click.option("--output-len", type=POSITIVE, default=48, show_default=True)
@click.option("--num-prompts", type=POSITIVE, default=8, show_default=True)
@click.option("--long-len", type=POSITIVE, help="Prompt tokens of one row more.")
@click.option("--repeats", type=POSITIVE, default=8, show_default=True)
@engine_options
def trace_cost(**options: Any) -> None:
    """The same rows with --trace and without it."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.observe import bench

        count, output_len = options["num_prompts"], options["output_len"]
        vocab_size = model.config.vocab_size
        requests = bench.synthetic(count, options["input_len"], output_len, vocab_size)
        if options["long_len"]:
            *_, long = bench.synthetic(count + 1, options["long_len"], output_len, vocab_size)
            requests.append(long)
        return bench.trace_cost(comm, model, settings, requests, options["repeats"])

    _measured(options, measure)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--document-len", type=POSITIVE, default=3000, show_default=True)
@click.option("--question-len", type=POSITIVE, default=40, show_default=True)
@click.option("--output-len", type=POSITIVE, default=16, show_default=True)
@click.option("--rows", type=POSITIVE, default=64, show_default=True)
@click.option("--repeats", type=POSITIVE, default=1, show_default=True)
@engine_options
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

    _measured(options, measure)


@command.command()
@click.option("--model", required=True, help="Model directory.")
@click.option("--trace", "traces", required=True, multiple=True, help="Trace: FILE.toml#NAME.")
@click.option("--rows", type=POSITIVE, help="Rows of each trace. [default: the trace's]")
@click.option("--scale", default=1.0, show_default=True, help="Divide all prompts by this.")
@click.option(
    "--scale-output",
    type=Number(min=0, min_open=True),
    help="Divide all outputs by this. [default: --scale]",
)
@click.option(
    "--limits",
    default=1.0,
    show_default=True,
    help="Above 1, outputs are not known beforehand: rows allow for this many times as much, and "
    "end at random.",
)
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
        from hpc_distkv.api import SetupError, together
        from hpc_distkv.engine.rank import RankEngine, unite
        from hpc_distkv.observe.policies import check_fit, compare, draw, engine_of, way
        from hpc_distkv.simulate.workload import Workload

        if comm.world.tp > 1:
            raise SetupError("give tensor-parallel in --against: --tensor-parallel-size must be 1")

        def traces() -> dict[str, list[Request]]:
            loaded = [Workload.load(name) for name in options["traces"]]
            loaded = [t.head(options["rows"]) if options["rows"] else t for t in loaded]
            scaled = [t.scaled(options["scale"], options["scale_output"]) for t in loaded]
            limited = [t.limited(options["limits"]) for t in scaled]
            return {t.name: t.requests(model.config.vocab_size) for t in limited}

        def engines_of_ways() -> dict[str, RankEngine]:
            names, pool = options["against"].split(","), 0
            engines = {}
            # The replicas first: they say how much memory there is for the others.
            for name in sorted(names, key=lambda name: name == "tensor-parallel"):
                ways = way(name, settings, comm.world.size)
                engines[name] = engine_of(comm, options["model"], model, ways, pool)
                pool = engines[name].config.num_blocks
            return {name: engines[name] for name in names}

        requests, engines = together(comm, traces), together(comm, engines_of_ways)
        for engine in engines.values():
            unite(engine.comm)
            engine.join()
        for rows in requests.values():
            together(comm, partial(check_fit, engines, rows))
        results = {
            name: compare(model.config, engines, rows, options["repeats"])
            for name, rows in requests.items()
        }
        figures = {"ways": list(engines), "traces": results}
        if comm.world.rank == 0 and options["output"]:
            folder = Path(options["output"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "policies.json").write_text(json.dumps(figures, indent=2) + "\n")
            draw(folder, results)
        return figures

    _measured(options, measure)


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
