"""What a batch needs: its longest rows, KV memory, and time."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple

from hpc_distkv.batch.errors import InputError
from hpc_distkv.batch.input.rows import Row
from hpc_distkv.control.messages.requests import kv_tokens
from hpc_distkv.units import duration, size

LONGEST = 3
"""Longest rows that are shown."""
SHOWN = 60
"""Characters of a custom_id that are shown."""


class Pool(NamedTuple):
    """The KV cache of one rank."""

    block_size: int
    """Tokens per rBlock."""
    num_blocks: int | None
    """None: not known."""

    @property
    def tokens(self) -> int | None:
        """That it holds."""
        return None if self.num_blocks is None else self.num_blocks * self.block_size


class Footprint(NamedTuple):
    """The KV that each answer of a row needs at most."""

    prompt: int
    """Tokens."""
    output: int | None
    """Tokens at most; None: the row sets no limit, and `blocks` and `ranks` are of its prompt."""
    blocks: int
    """rBlocks."""
    ranks: int | None
    """Ranks whose pools hold them together; None: the size of a pool is not known."""

    @classmethod
    def of(cls, row: Row, pool: Pool) -> Footprint:
        """The footprint of a row in such pools."""
        output = None if row.open_ended else row.sampling.max_tokens
        blocks = -(-kv_tokens(len(row.prompt), output or 1) // pool.block_size)
        ranks = -(-blocks // pool.num_blocks) if pool.num_blocks else None
        return cls(len(row.prompt), output, blocks, ranks)

    def cells(self) -> tuple[str, ...]:
        """Prompt, output, rBlocks and ranks as words; "+" where there may come more."""
        more = "+" if self.output is None else ""
        return (
            str(self.prompt),
            "open" if self.output is None else str(self.output),
            f"{self.blocks}{more}",
            "?" if self.ranks is None else f"{self.ranks}{more}",
        )


class JobShape(NamedTuple):
    """Of the job that is to answer the batch."""

    pool: Pool
    """Of each rank."""
    block_bytes: int
    """Of an rBlock on each rank that holds a part of it."""
    instances: int
    """Replicas of the model that can lend to each other."""
    max_num_seqs: int


class AssumedSpeed(NamedTuple):
    """Of the whole job: prompts and outputs take their time one after the other, in proportion to
    their tokens."""

    prompt: float
    """Tokens per second."""
    output: float

    def seconds(self, prompt: int, output: float) -> tuple[float, float]:
        """Least and most time of so many tokens."""
        time = prompt / self.prompt + output / self.output
        return time, time


class MeasuredSpeed(NamedTuple):
    """An earlier run, scaled to as many instances as this job has. It says what prompts and outputs
    took together, not what part each had: so an estimate has two ends, as if either had taken all
    of it."""

    prompt: int
    """Tokens."""
    output: int
    answers: int
    time: float
    """Seconds."""

    @classmethod
    def of(cls, figures: Mapping[str, Any], instances: int) -> MeasuredSpeed:
        """From what `generate --metrics` wrote. Raises InputError."""
        try:
            found = cls(
                figures["prompt_tokens"],
                figures["output_tokens"],
                figures["request_counts"]["completed"],
                figures["seconds"] * figures["job"]["instances"] / instances,
            )
        except KeyError as error:  # it is a trace, or says not how many ranks there were
            raise InputError(
                f"--metrics is no file that `generate --metrics` wrote ({error!r}): give one"
            ) from None
        if min(found) <= 0:
            raise InputError(
                "--metrics: that run answered nothing, so it says nothing of the speed"
            )
        return found

    def seconds(self, prompt: int, output: float) -> tuple[float, float]:
        """Least and most time of so many tokens."""
        ends = sorted((prompt / self.prompt, output / self.output))
        return self.time * ends[0], self.time * ends[1]


class Sizing:
    """Adds up what rows ask for."""

    def __init__(self, shape: JobShape) -> None:
        self.shape = shape
        self.answers = 0
        self.prompt_tokens = 0
        self.most_output = 0
        """Tokens of all outputs at their limits."""
        self._blocks = 0
        self._longest: list[tuple[int, int, str]] = []
        """rBlocks, minus the row's number, and how it is shown: a heap."""

    def add(self, row: Row, needed: Footprint) -> None:
        """A row that can be answered."""
        self.answers += row.choices
        self.prompt_tokens += needed.prompt
        self.most_output += row.choices * row.sampling.max_tokens
        self._blocks += row.choices * needed.blocks
        entry = (needed.blocks, -row.number)
        if len(self._longest) < LONGEST or entry > self._longest[0][:2]:
            push = heapq.heappush if len(self._longest) < LONGEST else heapq.heapreplace
            push(self._longest, (*entry, _shown(row, needed)))

    def lines(self, speed: AssumedSpeed | MeasuredSpeed | None) -> list[str]:
        """Of a report; none if there are no rows."""
        if not self.answers:
            return []
        ordered = sorted(self._longest, reverse=True)
        lines = ["longest rows", *(f"  {shown}" for *_, shown in ordered), *self._memory_lines()]
        return lines + (self._time_lines(speed) if speed else [])

    @property
    def longest(self) -> int:
        """rBlocks of the longest row."""
        return max(self._longest)[0]

    @property
    def mean(self) -> float:
        """rBlocks of an answer."""
        return self._blocks / self.answers

    @property
    def together(self) -> int:
        """Answers that run at once on one rank."""
        return min(self.shape.max_num_seqs, -(-self.answers // self.shape.instances))

    @property
    def pool_bytes(self) -> int:
        """That a rank's pool is given, or should have: for its part of the longest row, and for
        the rows that run at once."""
        blocks = self.shape.pool.num_blocks
        if blocks is None and self.answers:
            part = -(-self.longest // self.shape.instances)
            blocks = max(part, round(self.together * self.mean))
        return (blocks or 0) * self.shape.block_bytes

    def _memory_lines(self) -> list[str]:
        """What pools must hold so that rows fit, and run together."""
        pool, block_bytes, instances, _ = self.shape
        parts = f", or {_pool(-(-self.longest // instances), block_bytes)} on each of {instances}"
        together = _pool(round(self.together * self.mean), block_bytes)
        lines = [
            f"KV cache      {size(block_bytes)} an rBlock of {pool.block_size} tokens",
            f"  longest row {_pool(self.longest, block_bytes)} on one rank"
            + parts * (instances > 1),
            f"  at once     {together} a rank for {self.together} rows of mean length",
        ]
        if pool.num_blocks:
            at_once = int(pool.num_blocks / self.mean)
            lines.append(f"  given       {at_once} rows of mean length at once on a rank")
        return lines

    def _time_lines(self, speed: AssumedSpeed | MeasuredSpeed) -> list[str]:
        """The time, and what it rests on."""
        prompt = self.prompt_tokens
        most = speed.seconds(prompt, self.most_output)[1]
        if isinstance(speed, MeasuredSpeed):
            mean = speed.output / speed.answers
            usual = min(self.most_output, self.answers * mean)
            return [
                f"time          {_span(*speed.seconds(prompt, usual))} with outputs as long as in "
                f"that run (a mean of {mean:.0f} tokens), {duration(most)} at most",
                "  if speed grows with the instances, and prompts share as much as there",
            ]
        least = speed.seconds(prompt, self.answers)[0]
        return [
            f"time          {_span(least, most)}, for outputs of one token to all at their limits",
            f"  at {speed.prompt:g} prompt tokens/s, then {speed.output:g} output tokens/s",
        ]


def _shown(row: Row, needed: Footprint) -> str:
    """In one line."""
    name = repr(row.custom_id)[1:-1]
    name = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
    output = "open" if needed.output is None else needed.output
    return (
        f"line {row.number + 1}, {name}: {needed.prompt} + {output} tokens, {needed.blocks} rBlocks"
    )


def _pool(blocks: int, block_bytes: int) -> str:
    """The size of a pool, as options have it."""
    return f"--num-blocks {blocks} ({size(blocks * block_bytes)})"


def _span(least: float, most: float) -> str:
    ends = duration(least), duration(most)
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
