"""What the benchmarks that run on all ranks have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.options import POSITIVE, F, added, engine_options

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.control.messages.requests import Request
    from hpc_distkv.model.decoder import Decoder
    from hpc_distkv.start.options import EngineOptions

Measure = Callable[["Comm", "Decoder", "EngineOptions"], dict[str, Any]]
MODEL = click.option("--model", required=True, help="Model directory.")


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
