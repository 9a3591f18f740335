"""Options that say what of a trace is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.options import POSITIVE, Number, added

if TYPE_CHECKING:
    from hpc_distkv.simulate.workload import Workload

trace_options = added(
    click.option("--rows", type=POSITIVE, help="Rows of a trace. [default: the trace's]"),
    click.option("--scale", default=1.0, show_default=True, help="Divide all prompts by this."),
    click.option(
        "--scale-output",
        type=Number(min=0, min_open=True),
        help="Divide all outputs by this. [default: --scale]",
    ),
    click.option(
        "--limits",
        default=1.0,
        show_default=True,
        help="Above 1, outputs are not known beforehand: rows allow for this many times as much, "
        "and end at random.",
    ),
)


def load_trace(name: str, options: dict[str, Any]) -> Workload:
    """What `trace_options` leave of the trace FILE.toml#NAME. Raises OptionError."""
    from hpc_distkv.simulate.workload import Workload

    trace = Workload.load(name)
    trace = trace.head(options["rows"]) if options["rows"] else trace
    return trace.scaled(options["scale"], options["scale_output"]).limited(options["limits"])
