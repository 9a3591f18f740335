"""The shape of what runs write, as a report reads it back, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.percentiles import PERCENTILES
from hpc_distkv.observe.summary.legs import DISTRIBUTIONS

MOST = 10**18
"""No number of a run is larger; NaN and infinity are none."""
SUMMARY = {*(f"p{p}" for p in PERCENTILES), "max"}
"""What a distribution is shown by."""
NOTHING_COUNTED = dict.fromkeys(set(Counters.__struct_fields__) - {"gaps"}, 0)
"""Counters that a version did not know yet count nothing."""

Count = Annotated[int, Meta(ge=0, le=MOST)]
Amount = Annotated[float, Meta(ge=0, le=MOST)]
Number = Annotated[int, Meta(ge=-MOST, le=MOST)] | Annotated[float, Meta(ge=-MOST, le=MOST)]
Bin = tuple[Annotated[float, Meta(gt=0, le=MOST)], Annotated[int, Meta(ge=1, le=MOST)]]


class About(msgspec.Struct, omit_defaults=True):
    """What a run was; what a version did not say is left out."""

    format: str = ""
    """Of a trace."""
    version: str = ""
    model: str = ""
    input: str = ""
    output: str | None = None
    shard: str | None = None
    resumed: bool | None = None
    slurm_job_id: str | None = None
    slurm_restart_count: str | None = None
    started: str = ""
    ranks: Count = 0
    instances: Count = 0
    tensor_parallel_size: Count = 0
    nodes: Count = 0
    dtype: str = ""
    block_size: Count = 0
    num_blocks: Count = 0


class Requests(msgspec.Struct):
    """Rows of the job."""

    total: Count | None
    completed: Count
    failed: Count


class Rows(msgspec.Struct):
    """Rows of the run."""

    answered: Count
    failed: Count


class Rank(msgspec.Struct):
    """One rank of the run."""

    rank: Count
    counters: dict[str, Number]

    def __post_init__(self) -> None:
        """Fill in what is not counted."""
        self.counters = NOTHING_COUNTED | self.counters


class SlowRow(msgspec.Struct):
    """One of those that took longest."""

    custom_id: str
    prompt_tokens: Count
    output_tokens: Count
    time_to_first_token_s: Amount
    latency_s: Amount


class Metrics(msgspec.Struct):
    """The figures of a run."""

    request_counts: Requests
    rows: Rows
    stopped: bool
    seconds: Amount
    prompt_tokens: Count
    output_tokens: Count
    output_tokens_per_second: Amount
    tokens_per_second: Amount
    time_to_first_token_s: dict[str, Amount]
    between_tokens_s: dict[str, Amount]
    latency_s: dict[str, Amount]
    histograms: dict[str, list[Bin]]
    counters: dict[str, Number]
    ranks: list[Rank]
    slowest_rows: list[SlowRow]
    job: About = msgspec.field(default_factory=About)

    def __post_init__(self) -> None:
        """Fill in what is not counted. Raises ValueError if a distribution is not whole."""
        self.counters = NOTHING_COUNTED | self.counters
        for name in DISTRIBUTIONS:
            if name not in self.histograms:
                raise ValueError(f"`histograms` has no `{name}`")
            summary = getattr(self, name)
            missing = SUMMARY - summary.keys()
            if missing and (summary or self.histograms[name]):
                raise ValueError(f"`{name}` has no `{min(missing)}`")


def as_about(content: Any) -> dict[str, Any]:
    """What a run was, as far as it is known here. Raises msgspec.ValidationError."""
    about: dict[str, Any] = msgspec.to_builtins(msgspec.convert(content, About))
    return about


def as_metrics(content: Any) -> dict[str, Any]:
    """The figures of a run that a report shows. Raises msgspec.ValidationError."""
    metrics: dict[str, Any] = msgspec.to_builtins(msgspec.convert(content, Metrics))
    return metrics
