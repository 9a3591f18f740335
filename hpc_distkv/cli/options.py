"""Options that several commands share, and the values they take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from hpc_distkv.batch.shard import Shard
from hpc_distkv.engine.options import MOST_THREADS
from hpc_distkv.model.config import DTYPE_BYTES

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


ENGINE_OPTIONS = (
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="What ranks compute on; auto: a GPU where there is one.",
    ),
    click.option(
        "--allow-gpu-sharing",
        is_flag=True,
        help="Let ranks share a GPU, for trials: give --kv-memory too.",
    ),
    click.option(
        "--enforce-eager", is_flag=True, help="Never replay decode steps of a GPU as CUDA graphs."
    ),
    click.option(
        "--attention-backend",
        type=click.Choice(["auto", "flashinfer"]),
        default="auto",
        show_default=True,
        help="Attention kernels on GPUs; flashinfer: its kernels where they serve, which must be "
        "installed, and no CUDA graphs; auto: this program's own.",
    ),
    click.option(
        "--transport",
        type=click.Choice(["auto", "nccl", "mpi"]),
        default="auto",
        show_default=True,
        help="How tensors go from GPU to GPU; mpi: by way of the host; auto: NCCL where it can be.",
    ),
    click.option(
        "--gpu-memory-utilization",
        type=Number(0, 1, min_open=True),
        default=0.9,
        show_default=True,
        help="Part of the memory that a GPU has free beside the weights, for steps and KV cache.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPE_BYTES]),
        default="auto",
        show_default=True,
        help="Of weights and KV cache; auto is the checkpoint's.",
    ),
    click.option("--num-blocks", type=POSITIVE, help="rBlocks in the pool of one rank."),
    click.option(
        "--kv-memory",
        type=Size(),
        help="KV cache of one rank, e.g. 4GiB, if --num-blocks is not given. "
        "[default: 40 % of the node's available memory over its ranks; on a GPU, what is left]",
    ),
    click.option(
        "--host-kv-memory",
        type=Size(),
        help="Memory of the host that one rank may use for rBlocks its KV cache has no room for: "
        "of rows that give way, and of rows larger than all KV caches. [default: none]",
    ),
    click.option(
        "--host-kv-path",
        metavar="DIR",
        help="Directory on a disk of the node: --host-kv-memory is a file there. CPUs only.",
    ),
    click.option(
        "--block-size",
        type=POSITIVE,
        default=32,
        show_default=True,
        help="Tokens per rBlock.",
    ),
    click.option(
        "--max-num-seqs",
        type=POSITIVE,
        default=128,
        show_default=True,
        help="Rows that run at once on one rank.",
    ),
    click.option(
        "--max-num-batched-tokens",
        type=POSITIVE,
        default=512,
        show_default=True,
        help="Tokens in one step of one rank.",
    ),
    click.option(
        "--policy",
        type=click.Choice(["lend", "lend-greedy", "migrate", "queue", "isolated"]),
        default="lend",
        show_default=True,
        help="How ranks share memory: lend rBlocks where it pays; only where they are short; "
        "migrate whole requests; share nothing but the queue of rows; or not even that.",
    ),
    click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=True,
        show_default=True,
        help="Compute equal beginnings of rows once on each rank, and share their rBlocks.",
    ),
    click.option(
        "--move-budget",
        type=click.IntRange(min=0),
        default=16,
        show_default=True,
        help="KV tokens a rank may move per step though no row waits for them.",
    ),
    click.option(
        "--lend-cap",
        type=click.IntRange(min=0),
        help="Most rBlocks a rank lends to others. [default: all]",
    ),
    click.option(
        "--tensor-parallel-size",
        type=POSITIVE,
        default=1,
        show_default=True,
        help="Ranks, one after another, that hold one replica of the model together.",
    ),
    click.option(
        "--load-format",
        type=click.Choice(["auto", "broadcast", "dummy"]),
        default="auto",
        show_default=True,
        help="auto: every rank reads its weights; broadcast: only the ranks of the first replica "
        "do, and hand them on; dummy: random weights, for benchmarks.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        help="Compute threads of one rank. [default: its share of the cores]",
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


def engine_options(command: F) -> F:
    """Add `ENGINE_OPTIONS` to a command."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command
