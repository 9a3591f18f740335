"""The KV that sequences are expected to need, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from operator import attrgetter
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.messages.requests import MeanOutput
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.ids import PrefixId
from hpc_distkv.memory.rmanager import RManager

Tokens = TypeVar("Tokens", float, NDArray[np.float64])


class ExpectedKv(NamedTuple):
    """The KV that one sequence is expected to have at home from `start` to `end`, in steps from
    now. It grows by a token a step."""

    start: float
    """When it takes its first ones."""
    end: float
    """When it gives all back; after `start`."""
    tokens: float
    """Tokens at home at its start, those of its prompt that are still to be computed included."""

    def at(self, start: float) -> ExpectedKv:
        """The same, begun at `start`."""
        return ExpectedKv(start, start + self.end - self.start, self.tokens)


class Foresight:
    """Expects that sequences decode a token a step, and use as much of their output limits as those
    that have finished. Owner of what is known of outputs."""

    def __init__(self, rmanager: RManager, config: EngineConfig) -> None:
        self.outputs = MeanOutput()
        self._rm = rmanager
        self._config = config

    def missing(self, sequence: Sequence, tokens: int) -> int:
        """rBlocks the sequence lacks for its first `tokens` tokens."""
        table = self._rm.tables.get(sequence.id)
        held = table.blocks if table else self._rm.prefixes.in_use(sequence.keys)
        return max(0, self._config.blocks(min(tokens, sequence.final_len)) - held)

    def expected_end(self, sequence: Sequence) -> float:
        """Tokens of prompt and output that the sequence is expected to have at its end."""
        output = self.outputs.expected(sequence.request.sampling.max_tokens)
        return sequence.prompt_len + max(output, sequence.output_len + 1)

    def uncomputed(self, sequence: Sequence) -> int:
        """Tokens that the sequence has to compute before it gets the next one."""
        if sequence.id in self._rm.tables:
            return sequence.remaining
        there = max(self._rm.prefixes.coming(sequence.keys), self._rm.swap.computed(sequence.id))
        return sequence.length - there * self._config.block_size

    def at_home(self, running: SequenceOf[Sequence]) -> int:
        """rBlocks that these sequences have here, shared ones counted once."""
        own = sum(len(self._rm.tables[sequence.id].slots) for sequence in running)
        return own + self._rm.prefixes.at_home(sequence.id for sequence in running)

    def expected_kvs(self, running: SequenceOf[Sequence]) -> list[ExpectedKv]:
        """Of these sequences; what they share counts with the one that ends last."""
        size, prefixes = self._config.block_size, self._rm.prefixes
        counted: set[PrefixId] = set()
        expected = []
        for kv, sequence in sorted(
            ((self.expected_kv(sequence), sequence) for sequence in running),
            key=lambda pair: pair[0].end,
            reverse=True,
        ):
            shared = [p for p in prefixes.chain(sequence.id) if p.id not in counted]
            if shared:
                counted.update(prefix.id for prefix in shared)
                tokens = size * sum(len(prefix.slots) for prefix in shared)
                kv = kv._replace(tokens=kv.tokens + tokens)
            expected.append(kv)
        return expected

    def expected_kv(self, sequence: Sequence) -> ExpectedKv:
        """What the sequence needs if it runs from now on, beside what others use too."""
        table = self._rm.tables.get(sequence.id)
        away = table.absent if table else self._rm.prefixes.in_use(sequence.keys)
        tokens = sequence.length - away * self._config.block_size
        return ExpectedKv(0, self.expected_end(sequence) - sequence.length, tokens)

    def peak(self, expected: SequenceOf[ExpectedKv], until: float = math.inf) -> float:
        """Most rBlocks taken together at any time before `until`, where one of `expected` ends."""
        # Each grows until it ends, so the most is taken just before one of them ends.
        later = [kv for kv in expected if kv.start]
        most = tokens = 0.0
        begun = 0
        for kv in sorted(expected, key=attrgetter("end"), reverse=True):
            if not kv.start:
                tokens, begun = tokens + kv.tokens, begun + 1
            taken = (tokens + begun * kv.end) / self._config.block_size + 0.5 * begun
            for other in later:
                if other.start < kv.end <= other.end:
                    taken += self._blocks(other.tokens + kv.end - other.start)
            if kv.end <= until:
                most = max(most, taken)
        return most

    def start(self, running: SequenceOf[ExpectedKv], kv: ExpectedKv, room: float) -> float:
        """The first end of one of `running` from which `kv` fits into `room` beside the others.
        All of them have begun, and `kv` would begin now."""
        ends = np.unique([kv.end for kv in running])
        # Begun when another ends, it takes most beside others just before one of them ends,
        # or just before it ends itself.
        age = ends[None, :] - ends[:, None]
        beside = self._taken(running, ends)[None, :] + self._blocks(kv.tokens + age)
        most = np.where((age > 0) & (age <= kv.end), beside, 0.0).max(axis=1)
        others = self._taken(running, ends + kv.end)
        last = np.where(others > 0, others + self._blocks(np.array(kv.tokens + kv.end)), 0.0)
        free = np.flatnonzero(np.maximum(most, last) <= room)
        return float(ends[free[0]])

    def _taken(
        self, expected: SequenceOf[ExpectedKv], moments: SequenceOf[float] | NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64 `[moments]`: rBlocks taken together just before each of these."""
        start, end, tokens = np.array(expected, dtype=float).reshape(-1, 3).T
        moment = np.asarray(moments, dtype=float)[:, None]
        live = (start < moment) & (moment <= end)
        blocks: NDArray[np.float64] = np.where(live, self._blocks(tokens + moment - start), 0.0)
        taken: NDArray[np.float64] = blocks.sum(axis=1)
        return taken

    def _blocks(self, tokens: Tokens) -> Tokens:
        """rBlocks of so many tokens: the last one is half full in the mean."""
        return tokens / self._config.block_size + 0.5
