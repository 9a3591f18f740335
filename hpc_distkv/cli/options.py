"""Options that several commands share, and the values they take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.side_files import has_side_name
from hpc_distkv.start.options import CHOICES, MOST_THREADS, EngineOptions

F = TypeVar("F", bound=Callable[..., Any])

POSITIVE = click.IntRange(min=1)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Number(click.FloatRange):
    """A finite number within a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Text → number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Size(click.ParamType[int]):
    """A number of bytes: 4GiB, 512MB, 1e9."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text → bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9.e+]+)\s*([kmgt]?)(i?)b?", str(value).strip().lower())
        try:
            number = float(match[1]) if match else -1.0
        except ValueError:
            number = -1.0
        if not match or not 0 < number < float("inf"):
            self.fail(f"'{value}' is no size: write for example 4GiB or 512MiB", param, ctx)
        return int(number * (1024 if match[3] else 1000) ** _POWERS[match[2]])


def read_shard(ctx: click.Context, param: click.Parameter, value: str | None) -> Shard | None:
    """What `--shard` says."""
    try:
        return None if value is None else Shard.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def results_files(paths: Sequence[Path]) -> list[Path]:
    """The results files among what a pattern such as results.jsonl* has found: neither side files
    nor logs; if there are none, all of it."""
    return [p for p in paths if not has_side_name(p) and p.suffix != ".log"] or list(paths)


def added(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Adds options to a command, in this order."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _engine(name: str, help: str, kind: Any = None, *spellings: str) -> Callable[[F], F]:
    """The option of a field of EngineOptions, with its default and its choices."""
    default = getattr(EngineOptions, name)
    return click.option(
        *(spellings or [f"--{name.replace('_', '-')}"]),
        type=click.Choice(CHOICES[name]) if name in CHOICES else kind,
        is_flag=isinstance(default, bool),
        default=default,
        show_default=default is not None and default is not False,
        help=help,
    )


HOST_KV_MEMORY = _engine(
    "host_kv_memory",
    "Memory of the host that one rank may use for rBlocks its KV cache has no room for: "
    "of preempted rows, and of rows larger than all KV caches. [default: none]",
    Size(),
)
PREFIX_CACHING = _engine(
    "enable_prefix_caching",
    "Compute equal beginnings of rows once on each rank, and share their rBlocks.",
    None,
    "--enable-prefix-caching/--no-enable-prefix-caching",
)
MOVE_BUDGET = _engine(
    "move_budget",
    "KV tokens a rank may move per step though no row waits for them.",
    click.IntRange(min=0),
)
LEND_CAP = _engine(
    "lend_cap", "Most rBlocks a rank lends to others. [default: all]", click.IntRange(min=0)
)
engine_options = added(
    _engine("device", "What ranks compute on; auto: a GPU where there is one."),
    _engine("allow_gpu_sharing", "Let ranks share a GPU, for trials: give --kv-memory too."),
    _engine("enforce_eager", "Never replay decode steps of a GPU as CUDA graphs."),
    _engine(
        "transport",
        "How tensors go from GPU to GPU; mpi: by way of the host; auto: NCCL where it can be.",
    ),
    _engine(
        "gpu_memory_utilization",
        "Part of the memory that a GPU has free beside the weights, for steps and KV cache.",
        Number(0, 1, min_open=True),
    ),
    _engine("dtype", "Of weights and KV cache; auto is the checkpoint's."),
    _engine("num_blocks", "rBlocks in the pool of one rank.", POSITIVE),
    _engine(
        "kv_memory",
        "KV cache of one rank, e.g. 4GiB, if --num-blocks is not given. "
        "[default: 90 % of what Slurm or a control group leaves a rank beside weights and steps; "
        "without such limits, 40 % of what the node does; on a GPU, what is left]",
        Size(),
    ),
    HOST_KV_MEMORY,
    click.option(
        "--host-kv-path",
        metavar="DIR",
        help="Directory on a disk of the node: --host-kv-memory is a file there. CPUs only.",
    ),
    _engine("block_size", "Tokens per rBlock.", POSITIVE),
    _engine("max_num_seqs", "Rows that run at once on one rank.", POSITIVE),
    _engine("max_num_batched_tokens", "Tokens in one step of one rank.", POSITIVE),
    _engine(
        "policy",
        "How ranks share memory: lend rBlocks where it pays; only where they are short; "
        "migrate whole requests; share nothing but the queue of rows; or not even that.",
    ),
    PREFIX_CACHING,
    MOVE_BUDGET,
    LEND_CAP,
    _engine(
        "tensor_parallel_size",
        "Ranks, one after another, that hold one replica of the model together.",
        POSITIVE,
    ),
    _engine(
        "load_format",
        "auto: every rank reads its weights; broadcast: only the ranks of the first replica "
        "do, and hand them on; dummy: random weights, for benchmarks.",
    ),
    _engine(
        "threads",
        "Compute threads of one rank. [default: its share of the cores]",
        click.IntRange(1, MOST_THREADS),
    ),
    click.option(
        "--stall-timeout",
        type=Number(min=0, min_open=True),
        default=300.0,
        show_default=True,
        help="Seconds without any progress after which a wait gives up.",
    ),
)
"""The options of an engine, spelled as in vLLM where it has them."""
