"""The benchmark of policies, side by side on the same ranks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.measured import MODEL, measured
from hpc_distkv.cli.options import POSITIVE, engine_options
from hpc_distkv.cli.traces import load_trace, trace_options

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.control.messages.requests import Request
    from hpc_distkv.model.decoder import Decoder
    from hpc_distkv.start.options import EngineOptions


@click.command()
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
        from hpc_distkv.bench.plots import plot_folder
        from hpc_distkv.bench.policies import check_fit, compare, draw, engines_of
        from hpc_distkv.comm.together import SetupError, together
        from hpc_distkv.observe.summary.metrics import write_json

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
