"""`hpc-distkv simulate`: a job on a cluster that need not be there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.options import POSITIVE, added, engine_option, load_trace, trace_options
from hpc_distkv.start.options import CHOICES

if TYPE_CHECKING:
    from hpc_distkv.control.policy import Policy
    from hpc_distkv.simulate.deployment import Deployment

TENSOR_PARALLEL = "tensor-parallel"


@click.command("simulate")
@click.argument("cluster")
@click.option("--model", required=True, help="A published shape such as llama2-7b, or a directory.")
@click.option("--trace", required=True, help="Rows: FILE.toml#NAME.")
@click.option(
    "--policy",
    type=click.Choice([*CHOICES["policy"], TENSOR_PARALLEL]),
    default="lend",
    show_default=True,
    help="As in generate; tensor-parallel: as few and as large instances as the model allows.",
)
@click.option("--no-planner", is_flag=True, help="Lend only where memory is short.")
@click.option("--no-dgfm", is_flag=True, help="Bring nothing home before its row ends.")
@trace_options
@click.option(
    "--tensor-parallel-size",
    "--tp",
    "tp",
    type=POSITIVE,
    help="GPUs of one instance. [default: as few as the model fits on]",
)
@engine_option("block_size", default=256)
@engine_option("max_num_seqs", default=256, help="Rows that run at once on one instance.")
@engine_option("max_num_batched_tokens", default=8192, help="Tokens in one step of one instance.")
@added(*map(engine_option, ("enable_prefix_caching", "move_budget", "lend_cap", "host_kv_memory")))
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write all figures (JSON).")
def command(**options: Any) -> None:
    """Answer the rows of a trace on CLUSTER, the description of a cluster (TOML), in virtual time.

    The scheduler, the memory managers and the gManager are those of a real job; only the times of
    steps, exchanges and moves are computed, from the cluster's speeds. All rows are there at the
    start.
    """
    from hpc_distkv.errors import OptionError
    from hpc_distkv.observe.summary.metrics import write_json
    from hpc_distkv.printable import LAYOUT, printable
    from hpc_distkv.simulate.simulation import Simulation

    output = options.pop("output")
    if output and not os.access(Path(output).absolute().parent, os.W_OK):
        raise OptionError(f"cannot write {output}: there is no directory to write in")
    deployment, trace = _deployment(options), load_trace(options["trace"], options)
    figures = Simulation(deployment, trace.rows).run().figures(deployment)
    click.echo(printable(_summary(figures, deployment), keep=LAYOUT))
    if output:
        try:
            write_json(Path(output), {"options": options, "trace": trace.summary(), **figures})
        except OSError as error:
            raise OptionError(f"cannot write {output}: {error.strerror}") from error


def _deployment(options: dict[str, Any]) -> Deployment:
    from hpc_distkv.decide.config import EngineConfig
    from hpc_distkv.simulate.cluster import Cluster
    from hpc_distkv.simulate.deployment import Deployment, usable_tp
    from hpc_distkv.simulate.models import ModelShape

    cluster, model = Cluster.load(options["cluster"]), ModelShape.named(options["model"])
    config = EngineConfig(
        num_blocks=1,
        block_size=options["block_size"],
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        policy=_policy(options),
        lend_cap=options["lend_cap"],
        move_budget=options["move_budget"],
        enable_prefix_caching=options["enable_prefix_caching"],
    )
    tp = options["tp"]
    if tp is None and options["policy"] == TENSOR_PARALLEL:
        tp = usable_tp(cluster, model, config.block_size)[-1]
    return Deployment.fit(cluster, model, config, tp, options["host_kv_memory"])


def _policy(options: dict[str, Any]) -> Policy:
    from hpc_distkv.control.policy import POLICIES

    name = options["policy"]
    policy = POLICIES["queue" if name == TENSOR_PARALLEL else name]
    return replace(
        policy,
        planner=policy.planner and not options["no_planner"],
        dgfm=policy.dgfm and not options["no_dgfm"],
    )


def _summary(figures: dict[str, Any], deployment: Deployment) -> str:
    rows, counters, rounds = figures["rows"], figures["counters"], figures["rounds"]
    wall, cost = rounds["wall_s"], figures["simulation"]
    lines = [
        f"cluster    {deployment.instances} instances of {deployment.tp} "
        f"{deployment.cluster.device.name} with {figures['pool_blocks']} rBlocks each: a row may "
        f"have {figures['row_capacity_tokens']} tokens",
        f"rows       {rows['answered']} answered, {rows['refused']} too long for that",
        f"time       {figures['seconds']:.2f} s, {figures['output_tokens_per_second']:.1f} output "
        f"tokens/s ({figures['output_tokens_per_second_per_gpu']:.2f} a GPU), "
        f"{figures['tokens_per_second']:.1f} tokens/s with prompts",
        f"latency    {_times('first token', figures['time_to_first_token_s'])}; "
        f"{_times('between tokens', figures['between_tokens_s'])}",
        f"memory     {figures['remote_share']:.1%} of rBlocks were remote; "
        f"{counters['blocks_borrowed']} lent, {counters['blocks_returned']} brought home, "
        f"{counters['migrations']} rows migrated, {counters['preemptions']} preemptions",
        *_host(figures),
        f"gManager   {rounds['count']} rounds: {wall['mean'] * 1e3:.2f} ms in the mean, "
        f"p99 {wall['p99'] * 1e3:.2f} ms; {rounds['bytes']['mean'] / 1e3:.1f} kB",
        f"simulated  in {cost['wall_s']:.1f} s, {cost['peak_memory_bytes'] / 1e6:.0f} MB",
    ]
    return "\n".join(lines)


def _host(figures: dict[str, Any]) -> list[str]:
    if not figures["host_blocks"]:
        return []
    counters = figures["counters"]
    return [
        f"host       {counters['blocks_to_host']} rBlocks to its memory and "
        f"{counters['blocks_from_host']} back, at most {counters['peak_host']} of "
        f"{figures['host_blocks']} there at once by one instance; "
        f"{counters['host_time']:.2f} s longer for attention to them"
    ]


def _times(name: str, seconds: dict[str, float]) -> str:
    shown = (f"{which} {seconds[which]:.3g} s" for which in ("p50", "p99", "max") if seconds)
    return f"{name} {', '.join(shown)}"
