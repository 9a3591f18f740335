"""What `generate` says of a run, in words."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hpc_distkv.api import Engine
from hpc_distkv.batch.input.intake import named
from hpc_distkv.batch.results.files import Files
from hpc_distkv.comm.world import World
from hpc_distkv.printable import printable

MOST_HOSTS = 16
"""That are named."""


def header(world: World, files: Files) -> str:
    """Which run this is, and when and where it begins: the first line of its part of the log."""
    hosts = list(dict.fromkeys(world.hosts))
    named = ", ".join(hosts[:MOST_HOSTS]) + (", ..." if len(hosts) > MOST_HOSTS else "")
    nodes = max(world.nodes) + 1
    parts = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}  hpc-distkv {version('hpc-distkv')}",
        f"{_count(world.size, 'rank')} on {_count(nodes, 'node')}"
        + (f": {named}" if named else ""),
        f"{files.input} to {files.output}" + (f", shard {files.shard}" if files.shard else ""),
    ]
    if files.job:
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        parts.insert(1, f"Slurm job {files.job}, restart {restarts}")
    return "; ".join(parts)


def loaded(engine: Engine) -> list[str]:
    """What the model and the machine came to, and what holds for rows."""
    defaults, rank, world = engine.defaults, engine.rank, engine.comm.world
    lending = f"one row may have {rank.capacity_tokens} tokens of KV"
    if world.instances > 1:
        lending += ", lent between ranks" if rank.config.policy.lending else ", nothing is lent"
    host = rank.config.host_blocks
    beside = f", {host} more in the memory of its host" if host else ""
    sampling = f"temperature {defaults.temperature:g}" if defaults.temperature else "greedy"
    ranks = _count(world.size, "rank")
    if world.tp > 1:
        ranks += f" in {world.instances} instances of {world.tp}"
    return [
        f"{ranks}, {rank.processor} each; {rank.dtype}; "
        f"{rank.config.num_blocks} rBlocks of {rank.config.block_size} tokens a rank"
        f"{beside}: {lending}",
        "for what a row leaves out, from the options or the model's generation_config.json: "
        f"{sampling}, top_p {defaults.top_p:g}, "
        f"top_k {defaults.top_k or 'off'}, min_p {defaults.min_p:g}, repetition_penalty "
        f"{defaults.repetition_penalty:g}, max_tokens {defaults.max_tokens or 'up to the limit'}, "
        f"seed {defaults.seed}",
    ]


def summary(figures: dict[str, Any], output: Path) -> str:
    """The figures of a run that is over. Rows and errors are those of the results, whoever
    answered them; all else is of this run."""
    rows, counters = figures["rows"], figures["counters"]
    lines = [
        f"rows      {_counted(rows, 'answered', 'answered')}, {_counted(rows, 'failed', 'errors')}",
        *_gone(figures),
        f"time      {figures['seconds']:.1f} s, {figures['output_tokens_per_second']:.1f} output "
        f"tokens/s, {figures['tokens_per_second']:.1f} tokens/s with prompts",
        *_sharing(counters),
        f"memory    {counters['blocks_borrowed']:.0f} rBlocks lent to other ranks, at most "
        f"{counters['peak_borrowed']:.0f} of one rank at once; "
        f"{counters['preemptions']:.0f} preemptions",
        *_host(counters),
        f"results   {output}",
    ]
    if figures["input_torn"]:
        lines.append("input     ends within a line: run the same command again when it is whole")
    elif figures["stopped"]:
        lines.append(
            f"stopped   before all rows were answered; {rows['put_aside']} rows with "
            f"{figures['put_aside_tokens']} output tokens are saved: run the same command again"
        )
    return "\n".join(map(printable, lines))


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def _counted(rows: dict[str, int], kind: str, called: str) -> str:
    """Rows of one kind in the results, and how many of them this run has made."""
    all_rows = rows[kind] + rows[f"{kind}_before"]
    before = rows["answered_before"] + rows["failed_before"]
    return f"{all_rows} {called}" + (f" ({rows[kind]} in this run)" if before else "")


def _gone(figures: dict[str, Any]) -> list[str]:
    gone = figures["rows_not_in_input"]
    if not gone:
        return []
    names = named(figures["rows_not_in_input_such_as"], gone)
    return [f"          {gone} of them not in the input any more{names}"]


def _sharing(counters: dict[str, Any]) -> list[str]:
    if not counters["cached_tokens"]:
        return []
    return [
        f"prompts   {counters['prompt_tokens']:.0f} tokens computed, "
        f"{counters['cached_tokens']:.0f} taken from rows that began alike"
    ]


def _host(counters: dict[str, Any]) -> list[str]:
    if not counters["blocks_to_host"]:
        return []
    return [
        f"host      {counters['blocks_to_host']:.0f} rBlocks to its memory and "
        f"{counters['blocks_from_host']:.0f} back, at most {counters['peak_host']:.0f} there at "
        "once by one rank"
    ]
