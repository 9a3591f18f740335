"""The benchmark of draws, on one CPU without ranks."""

from __future__ import annotations

import json

import click

from hpc_distkv.cli.measured import MODEL
from hpc_distkv.cli.options import POSITIVE


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
