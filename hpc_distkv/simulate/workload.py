"""Synthetic workloads: from a small TOML file to the lengths of a thousand rows.

A file describes classes of rows and mixes them into one or more named traces:

    description = "Chat with a few books"
    seed = 1

    [classes.chat]
    prompt = { law = "lognormal", median = 250, sigma = 1.2, min = 4, max = 8_000 }
    output = { law = "uniform", min = 1, max = 400 }
    prefixes = { count = 20, tokens = 1_500, zipf = 1.0 }

    [classes.book]
    long = true
    prompt = { law = "loguniform", min = 20_000, max = 150_000 }
    output = 300

    [traces]
    chat-and-books = { chat = 95, book = 5 }

Row counts and lengths are not drawn freely: each class gets its exact share of the rows, and its
lengths lie at evenly spaced quantiles of their law. The seed decides only which prompt meets which
output, and when. So few rows look like many, and two seeds have the same lengths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from hpc_distkv.control.messages.percentiles import percentiles
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.errors import OptionError
from hpc_distkv.ids import RequestId
from hpc_distkv.simulate.toml import read_toml

T = TypeVar("T")
Count = Annotated[int, Meta(ge=1)]
Mix = Annotated[dict[str, Count], Meta(min_length=1)]
"""Class → its share of the rows: whole numbers, percent for instance."""


class TraceRow(NamedTuple):
    """Lengths of one row in tokens. Rows of one `prefix` begin with the same tokens."""

    prompt: int
    """The shared prefix included, which is always shorter."""
    output: int
    prefix: int = -1
    """-1: shares nothing."""
    prefix_tokens: int = 0
    long: bool = False
    limit: int = 0
    """Output tokens that the row allows for beforehand; 0: just those it makes."""

    @property
    def max_tokens(self) -> int:
        """What a request says of its output."""
        return self.limit or self.output


class Uniform(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="law", tag=str.lower
):
    """All lengths from `min` to `max` alike."""

    min: Count
    max: Count

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, which is above max, {self.max}")

    def quantile(self, at: float) -> float:
        """The length that the part `at` of all rows stays below; 0 < `at` < 1."""
        return self.min + at * (self.max - self.min)


class Loguniform(Uniform, frozen=True):
    """Every doubling of the length from `min` to `max` alike: many short, a heavy tail."""

    def quantile(self, at: float) -> float:
        """See `Uniform`."""
        return float(self.min * (self.max / self.min) ** at)


class Lognormal(Uniform, frozen=True):
    """A bell around `median` on a log scale, `sigma` wide in e-folds; clipped."""

    median: Count
    sigma: Annotated[float, Meta(gt=0, le=10)]

    def quantile(self, at: float) -> float:
        """See `Uniform`."""
        length = self.median * math.exp(self.sigma * NormalDist().inv_cdf(at))
        return min(max(length, self.min), self.max)


Length = Count | Uniform | Loguniform | Lognormal


class Prefixes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts that the rows of a class begin with."""

    count: Count
    tokens: Length
    zipf: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """The k-th text is used in proportion to k^−zipf; 0: all alike."""


class RowClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows that are alike."""

    prompt: Length
    """Without the shared prefix."""
    output: Length
    prefixes: Prefixes | None = None
    long: bool = False
    """Counts as long in the summary."""

    def rows(self, count: int, first: int, draw: random.Random) -> list[TraceRow]:
        """`count` rows, their prefixes numbered from `first`."""
        starts = [(-1, 0)] * count
        if self.prefixes:
            # Before all that depends on the number of rows: a head shares the same texts.
            tokens = _lengths(self.prefixes.tokens, self.prefixes.count, draw)
            uses = _apportion(count, [k**-self.prefixes.zipf for k in range(1, len(tokens) + 1)])
            texts = zip(range(first, first + len(tokens)), tokens, strict=True)
            starts = [text for text, use in zip(texts, uses, strict=True) for _ in range(use)]
        prompts, outputs = _lengths(self.prompt, count, draw), _lengths(self.output, count, draw)
        return [
            TraceRow(tokens + prompt, output, prefix, tokens, self.long)
            for (prefix, tokens), prompt, output in zip(starts, prompts, outputs, strict=True)
        ]


class TraceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a trace file says."""

    description: str
    seed: Annotated[int, Meta(ge=0)]
    classes: dict[str, RowClass]
    traces: Annotated[dict[str, Mix], Meta(min_length=1)]
    rows: Count = 1000

    def __post_init__(self) -> None:
        for name, mix in self.traces.items():
            if unknown := mix.keys() - self.classes.keys():
                raise ValueError(
                    f"traces.{name} mixes {', '.join(sorted(unknown))}: no such class"
                    f" (there are {', '.join(self.classes)})"
                )

    def trace(self, name: str) -> Workload:
        """The trace `name`."""
        mix = self.traces[name]
        shares = ", ".join(f"{share} {kind}" for kind, share in mix.items())
        return Workload(
            name, f"{self.description} ({shares})", self.seed, self.rows, self.classes, mix
        )


@dataclass(frozen=True)
class Workload:
    """One of a file's traces: rows in order of arrival, always the same for the same fields."""

    name: str
    description: str
    seed: int
    count: int
    """Rows."""
    classes: Mapping[str, RowClass]
    mix: Mapping[str, int]
    factor: float = 1.0
    """Every prompt is divided by it."""
    output_factor: float = 1.0
    """Every output is divided by it."""
    limit_factor: float = 1.0
    """Every row allows for this many times its output."""

    @staticmethod
    def load(path: str | Path) -> Workload:
        """The trace FILE.toml, or FILE.toml#NAME where the file has several."""
        file, _, name = str(path).partition("#")
        content = _read(file)
        if not name and len(content.traces) == 1:
            name = next(iter(content.traces))
        if name not in content.traces:
            known = ", ".join(content.traces)
            what = f"has no trace {name}" if name else "has several traces"
            raise OptionError(f"{file} {what}: name one as {file}#NAME, out of {known}")
        return content.trace(name)

    @staticmethod
    def load_all(path: str | Path) -> list[Workload]:
        """All traces of a file, in its order."""
        content = _read(str(path))
        return [content.trace(name) for name in content.traces]

    def head(self, rows: int) -> Workload:
        """The same mix in `rows` rows, more or fewer."""
        if rows < 1:
            raise OptionError(f"a trace needs at least 1 row, not {rows}")
        return replace(self, count=rows)

    def scaled(self, factor: float, output_factor: float | None = None) -> Workload:
        """The same rows with every length divided by `factor`, but at least 1 token; outputs by
        `output_factor` if it is given."""
        outputs = factor if output_factor is None else output_factor
        for number in (factor, outputs):
            if not 0 < number < math.inf:
                raise OptionError(f"lengths cannot be divided by {number:g}: use a number above 0")
        apart = "" if outputs == factor else f", outputs by {outputs:g}"
        return replace(
            self,
            name=f"{self.name}/{factor:g}" + (f":{outputs:g}" if apart else ""),
            description=f"{self.description}, lengths divided by {factor:g}{apart}",
            factor=self.factor * factor,
            output_factor=self.output_factor * outputs,
        )

    def limited(self, factor: float) -> Workload:
        """The same rows, but their outputs are not known beforehand: each allows for `factor` times
        as much as it makes."""
        if not 1 <= factor < math.inf:
            raise OptionError(f"limits must be at least the outputs, not {factor:g} times as much")
        if factor == 1:
            return self
        return replace(
            self,
            name=f"{self.name}<{factor:g}",
            description=f"{self.description}, limits {factor:g} times the outputs",
            limit_factor=factor,
        )

    @cached_property
    def rows(self) -> list[TraceRow]:
        """The rows."""
        rows: list[TraceRow] = []
        first = 0
        counts = _apportion(self.count, list(self.mix.values()))
        for name, count in zip(self.mix, counts, strict=True):
            kind = self.classes[name]
            rows += kind.rows(count, first, random.Random(f"{self.seed} {name}"))
            first += kind.prefixes.count if kind.prefixes else 0
        return [self._scale(row) for row in _shuffled(rows, random.Random(self.seed))]

    def _scale(self, row: TraceRow) -> TraceRow:
        own, prefix = (
            max(1, round(tokens / self.factor))
            for tokens in (row.prompt - row.prefix_tokens, row.prefix_tokens)
        )
        output = max(1, round(row.output / self.output_factor))
        prefix = prefix if row.prefix_tokens else 0
        limit = math.ceil(output * self.limit_factor) if self.limit_factor > 1 else 0
        return row._replace(prompt=prefix + own, output=output, prefix_tokens=prefix, limit=limit)

    def summary(self) -> dict[str, float]:
        """Rows, tokens, percentiles of a row's prompt and output tokens together, and the share of
        all tokens that is in rows of long classes."""
        lengths = sorted(row.prompt + row.output for row in self.rows)
        return {
            "rows": len(lengths),
            "prompt_tokens": sum(row.prompt for row in self.rows),
            "output_tokens": sum(row.output for row in self.rows),
            **percentiles(lengths),
            "long_share": sum(r.prompt + r.output for r in self.rows if r.long) / sum(lengths),
        }

    def requests(self, vocab_size: int) -> list[Request]:
        """The rows as requests of random token ids; ids are 0, 1, … They end by length only, or
        with limits above their outputs at a random token: one in `output` of the vocabulary ends a
        row, so its outputs are geometric around that."""
        if vocab_size < 1:
            raise OptionError(f"vocab_size must be at least 1, not {vocab_size}")

        def text(tokens: int, *key: int) -> list[int]:
            # Raw bits: unlike numpy's distributions they are the same in all its versions.
            raw = np.random.PCG64([self.seed, *key]).random_raw(tokens)
            ids: list[int] = (raw % vocab_size).tolist()
            return ids

        def sampling(i: int, row: TraceRow) -> Sampling:
            if not row.limit:
                return Sampling(max_tokens=row.output)
            ends = sorted(set(text(max(1, vocab_size // row.output), 2, i)))
            return Sampling(row.limit, temperature=1.0, seed=i, stop_token_ids=tuple(ends))

        return [
            Request(
                RequestId(i),
                pack_tokens(
                    text(row.prefix_tokens, 1, row.prefix + 1)
                    + text(row.prompt - row.prefix_tokens, 0, i)
                ),
                sampling(i, row),
            )
            for i, row in enumerate(self.rows)
        ]


def _read(path: str) -> TraceFile:
    return read_toml(path, TraceFile, "trace file", _reason)


def _reason(content: dict[str, Any], error: msgspec.ValidationError) -> str:
    """What is wrong, with the name of the table, for which the error itself says [...]."""
    for section, kind in (("classes", RowClass), ("traces", Mix)):
        for name, table in content[section].items() if f"$.{section}[" in str(error) else ():
            try:
                msgspec.convert(table, kind)
            except msgspec.ValidationError as inner:
                return f"{section}.{name}: {inner}"
    return str(error)


def _lengths(law: Length, count: int, draw: random.Random) -> list[int]:
    """`count` lengths at evenly spaced quantiles of `law`, in random order."""
    if isinstance(law, int):
        return [law] * count
    return _shuffled((round(law.quantile((i + 0.5) / count)) for i in range(count)), draw)


def _apportion(count: int, weights: Sequence[float]) -> list[int]:
    """`count` split in proportion to `weights`, by largest remainder."""
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def _shuffled(values: Iterable[T], draw: random.Random) -> list[T]:
    """`values` in random order, the same in every version of Python (`shuffle` promises less)."""
    return sorted(values, key=lambda _: draw.random())
