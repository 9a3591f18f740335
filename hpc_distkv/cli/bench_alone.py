"""The benchmarks that need no ranks: parts of a job alone, and simulated clusters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hpc_distkv.cli.options import FOLDER, MODEL, POSITIVE


@click.command()
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

    from hpc_distkv.bench import kernels as bench

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


@click.command()
@MODEL
@click.option("--draws", "count", type=POSITIVE, default=100_000, show_default=True)
@click.option("--rows", type=POSITIVE, default=1000, show_default=True, help="Rows of logits.")
@click.option("--noise", default=1e-6, show_default=True, help="Standard deviation.")
def draws(model: str, count: int, rows: int, noise: float) -> None:
    """How many sampled tokens change when logits do so by rounding alone: by the race that draws
    them, and by the place among cumulative weights. Needs transformers."""
    from hpc_distkv.bench.draws import draw_figures
    from hpc_distkv.model.config import ModelConfig

    ModelConfig.from_dir(model)  # raises UserError for what is no model
    click.echo(json.dumps(draw_figures(model, count, rows, noise), indent=2))


@click.command()
@click.option(
    "--instances", multiple=True, type=POSITIVE, default=(32, 1_000, 10_000), show_default=True
)
@click.option("--rounds", "count", type=POSITIVE, default=50, show_default=True)
def rounds(instances: tuple[int, ...], count: int) -> None:
    """The gManager alone: time and bytes of a control round, by number of instances."""
    from hpc_distkv.bench.rounds import round_times

    figures = [round_times(number, count) for number in instances]
    click.echo(json.dumps(figures, indent=2))


@click.command()
@click.option("--rows", multiple=True, type=POSITIVE, default=(64, 256), show_default=True)
@click.option("--input-len", type=POSITIVE, default=512, show_default=True)
@click.option("--output-len", type=click.IntRange(min=30), default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option(
    "--step-ms", default=2.3, show_default=True, help="Milliseconds the device takes for a step."
)
def host(
    rows: tuple[int, ...], input_len: int, output_len: int, temperature: float, step_ms: float
) -> None:
    """The host's work for a decode step alone: a model without layers, on a device that is not
    there."""
    from msgspec.structs import replace

    from hpc_distkv.bench.host_overhead import VOCABULARY, host_figures
    from hpc_distkv.bench.runs import synthetic

    figures = []
    for count in rows:
        requests = [
            replace(request, sampling=replace(request.sampling, temperature=temperature))
            for request in synthetic(count, input_len, output_len, VOCABULARY)
        ]
        figures.append(host_figures(requests, step_ms / 1e3))
    click.echo(json.dumps(figures, indent=2))


@click.command()
@click.option("--cluster", default="jobs/clusters/a100-4x8.toml", show_default=True)
@click.option("--model", default="llama2-7b", show_default=True)
@click.option("--traces", default="jobs/traces", show_default=True, help="Folder of trace files.")
@click.option("--rows", type=POSITIVE, default=300, show_default=True, help="Rows of each trace.")
@FOLDER
def paper(cluster: str, model: str, traces: str, rows: int, output: str | None) -> None:
    """The published tables, from the simulator, beside the published numbers."""
    from hpc_distkv.simulate import paper as published
    from hpc_distkv.simulate.cluster import Cluster
    from hpc_distkv.simulate.models import ModelShape

    def measure() -> dict[str, Any]:
        shape = ModelShape.named(model)
        tables = published.tables(Cluster.load(cluster), shape, traces, rows)
        return {
            name: {
                "published": published.PUBLISHED[name],
                "differences": published.EXPLAINED[name],
                "simulated": table,
            }
            for name, table in tables.items()
        }

    figures = _simulated(measure, output, "paper.json")
    for name, table in figures.items():
        click.echo(f"{name}: published {table['published']}")
        for row, result in table["simulated"].items():
            ratios = result.get("lend_over") or {
                key: result[key] for key in ("over_instance", "over_node")
            }
            shown = ", ".join(f"{ratio:.2f} × {other}" for other, ratio in ratios.items())
            click.echo(f"  {row:22s} {shown}")
    if output:
        from hpc_distkv.bench.plots import bars

        for name in ("mixes", "short", "long"):
            ratios = {row: r["lend_over"] for row, r in figures[name]["simulated"].items()}
            title = f"Throughput of lend over …; published {figures[name]['published']}"
            bars(Path(output) / f"paper-{name}.svg", title, ratios, "×", None)
        context = figures["context_length"]
        tokens = {name: result["tokens"] for name, result in context["simulated"].items()}
        title = f"Longest row; published {context['published']}"
        bars(Path(output) / "paper-context.svg", title, tokens, "tokens", None)


@click.command()
@click.option("--cluster", default="jobs/clusters/h100-10000.toml", show_default=True)
@click.option("--model", default="llama2-7b", show_default=True)
@click.option("--trace", default="jobs/traces/mixes.toml#share-05-long-20k", show_default=True)
@click.option(
    "--gpus", multiple=True, type=POSITIVE, default=(8, 64, 512, 2048, 10_000), show_default=True
)
@click.option("--rows-per-gpu", type=POSITIVE, default=10, show_default=True)
@FOLDER
def scale(
    cluster: str,
    model: str,
    trace: str,
    gpus: tuple[int, ...],
    rows_per_gpu: int,
    output: str | None,
) -> None:
    """Throughput per GPU and gManager round time, from 8 to 10,000 simulated GPUs."""
    from hpc_distkv.simulate import paper as published
    from hpc_distkv.simulate.cluster import Cluster
    from hpc_distkv.simulate.models import ModelShape
    from hpc_distkv.simulate.workload import Workload

    def measure() -> dict[str, Any]:
        points = published.scale(
            Cluster.load(cluster), ModelShape.named(model), Workload.load(trace), gpus, rows_per_gpu
        )
        return {"model": model, "trace": trace, "points": points}

    figures = _simulated(measure, output, "scale.json")
    click.echo(json.dumps(figures, indent=2))
    if output:
        from hpc_distkv.bench.plots import lines

        points = figures["points"]
        for file, title, name, values in (
            (
                "scale-throughput.svg",
                "Throughput per GPU",
                "tokens/s per GPU",
                [(p["gpus"], p["tokens_per_second_per_gpu"]) for p in points],
            ),
            (
                "scale-round.svg",
                "Time of a gManager round",
                "ms",
                [(p["gpus"], 1e3 * p["round_seconds"]["mean"]) for p in points],
            ),
        ):
            series = {"lend": values}
            lines(Path(output) / file, title, series, "GPUs", name, log_x=True)


def _simulated(
    measure: Callable[[], dict[str, Any]], output: str | None, name: str
) -> dict[str, Any]:
    """Figures that need no ranks, also written to the folder `output`. Raises UserError."""
    from hpc_distkv.bench.plots import plot_folder
    from hpc_distkv.observe.summary.metrics import write_json

    folder = plot_folder(output) if output else None
    figures = measure()
    if folder:
        write_json(folder / name, figures)
    return figures
