"""Options that several commands share, and the values they take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.side_files import has_side_name
from hpc_distkv.start.options import CHOICES, MOST_THREADS, EngineOptions

if TYPE_CHECKING:
    from hpc_distkv.simulate.workload import Workload

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


def engine_option(name: str, **changes: Any) -> Callable[[F], F]:
    """The option of a field of EngineOptions, with its default and its choices; `changes`: what a
    command has otherwise."""
    default, spelling = getattr(EngineOptions, name), name.replace("_", "-")
    settings = {
        "type": click.Choice(CHOICES[name]) if name in CHOICES else None,
        "is_flag": isinstance(default, bool) or None,  # of False, click takes no value "-1"
        "default": default,
        "show_default": default is not None and default is not False,
        **_ENGINE[name],
        **changes,
    }
    return click.option(f"--{spelling}" + f"/--no-{spelling}" * (default is True), **settings)


_ENGINE: dict[str, dict[str, Any]] = {
    "device": {"help": "What ranks compute on; auto: a GPU where there is one."},
    "allow_gpu_sharing": {"help": "Let ranks share a GPU, for trials: give --kv-memory too."},
    "enforce_eager": {"help": "Never replay decode steps of a GPU as CUDA graphs."},
    "transport": {
        "help": "How tensors go from GPU to GPU; mpi: by way of the host; auto: NCCL where it can "
        "be.",
    },
    "gpu_memory_utilization": {
        "type": Number(0, 1, min_open=True),
        "help": "Part of the memory that a GPU has free beside the weights, for steps and KV "
        "cache.",
    },
    "dtype": {"help": "Of weights and KV cache; auto is the checkpoint's."},
    "num_blocks": {"type": POSITIVE, "help": "rBlocks in the pool of one rank."},
    "kv_memory": {
        "type": Size(),
        "help": "KV cache of one rank, e.g. 4GiB, if --num-blocks is not given. "
        "[default: 90 % of what Slurm or a control group leaves a rank beside weights and steps; "
        "without such limits, 40 % of what the node does; on a GPU, what is left]",
    },
    "host_kv_memory": {
        "type": Size(),
        "help": "Memory of the host that one rank may use for rBlocks its KV cache has no room "
        "for: of preempted rows, and of rows larger than all KV caches. [default: none]",
    },
    "host_kv_path": {
        "metavar": "DIR",
        "help": "Directory on a disk of the node: --host-kv-memory is a file there. CPUs only.",
    },
    "block_size": {"type": POSITIVE, "help": "Tokens per rBlock."},
    "max_num_seqs": {"type": POSITIVE, "help": "Rows that run at once on one rank."},
    "max_num_batched_tokens": {"type": POSITIVE, "help": "Tokens in one step of one rank."},
    "policy": {
        "help": "How ranks share memory: lend rBlocks where it pays; only where they are short; "
        "migrate whole requests; share nothing but the queue of rows; or not even that.",
    },
    "enable_prefix_caching": {
        "help": "Compute equal prefixes of rows once on each rank, and share their rBlocks.",
    },
    "move_budget": {
        "type": click.IntRange(min=0),
        "help": "KV tokens a rank may move per step though no row waits for them.",
    },
    "lend_cap": {
        "type": click.IntRange(min=0),
        "help": "Most rBlocks a rank lends to others. [default: all]",
    },
    "tensor_parallel_size": {
        "type": POSITIVE,
        "help": "Ranks, one after another, that hold one replica of the model together.",
    },
    "load_format": {
        "help": "auto: every rank reads its weights; broadcast: only the ranks of the first "
        "replica do, and hand them on; dummy: random weights, for benchmarks.",
    },
    "threads": {
        "type": click.IntRange(1, MOST_THREADS),
        "help": "Compute threads of one rank. [default: its share of the cores]",
    },
}
"""Field of EngineOptions → what its option has beside its name and default."""
engine_options = added(
    *map(engine_option, _ENGINE),
    click.option(
        "--stall-timeout",
        type=Number(min=0, min_open=True),
        default=300.0,
        show_default=True,
        help="Seconds without any progress after which a wait gives up.",
    ),
)
"""The options of an engine, spelled as in vLLM where it has them."""


def engine_settings(options: Mapping[str, Any]) -> EngineOptions:
    """The engine options among a command's options. Raises OptionError."""
    names = EngineOptions.__dataclass_fields__.keys() & options
    return EngineOptions(**{name: options[name] for name in names})


MODEL = click.option("--model", required=True, help="Model directory.")
INPUT = click.option("-i", "--input", "source", required=True, help="Batch file (OpenAI JSONL).")
MOVED_INPUT = click.option(
    *("-i", "--input", "source"),
    type=click.Path(path_type=Path),
    help="Batch file, if it is not where it was.",
)
LENGTHS = added(
    click.option(
        "--max-model-len",
        type=POSITIVE,
        help="Longest prompt and output together, in tokens. [default: the model's]",
    ),
    click.option("--max-tokens", type=POSITIVE, help="Output tokens of rows that give no number."),
)
FOLDER = click.option(
    "-o", "--output", type=click.Path(file_okay=False), help="Folder for JSON and plots."
)
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
"""What of a trace is run."""


def load_trace(name: str, options: dict[str, Any]) -> Workload:
    """What `trace_options` leave of the trace FILE.toml#NAME. Raises OptionError."""
    from hpc_distkv.simulate.workload import Workload

    trace = Workload.load(name)
    trace = trace.head(options["rows"]) if options["rows"] else trace
    return trace.scaled(options["scale"], options["scale_output"]).limited(options["limits"])
