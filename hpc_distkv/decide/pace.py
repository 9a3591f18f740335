"""How fast one instance is, as its steps have shown."""

from __future__ import annotations

from typing import NamedTuple

from hpc_distkv.control.assign.work import STEP_TOKENS
from hpc_distkv.decide.step_time import StepTime

EXCHANGES = 500
"""Decode steps with an exchange of which the mean counts: a wait is short or long by what the
creditor computes meanwhile."""
SETTLED = 16
"""Decode steps before their model counts as known: loans for gain must not follow noise."""


class StepWork(NamedTuple):
    """What a step had to compute."""

    decodes: int
    """Rows in decode."""
    kv_tokens: int
    """KV tokens at home that they attended to."""
    prompt_work: float
    """Prompt tokens computed, weighted as in `control.assign.work`."""
    exchanging: bool
    """Whether rows had rBlocks at creditors."""


class Speed(NamedTuple):
    """Measured seconds of one instance; 0 where nothing was measured."""

    fixed: float
    """Of a decode step, whatever its rows."""
    per_token: float
    """Of a decode step, per row."""
    per_kv: float
    """Of a decode step, per KV token at home."""
    prompt: float
    """Per prompt token, attention left out."""
    exchange: float
    """That remote rBlocks add to a decode step."""


class StepSeconds(NamedTuple):
    """How long a step took, in seconds."""

    total: float
    partial_wait: float
    """Of that, waiting for creditors' partial results."""
    beside: float
    """Of that, waiting for moves, serving debtors, and attending in the host's memory."""


class Calibration(NamedTuple):
    """Costs in prompt tokens: how many are computed in the same time. Defaults until measured."""

    step_tokens: float = STEP_TOKENS
    """The fixed time of a step."""
    exchange_tokens: float = 10.0
    """What remote rBlocks add to a step."""
    block_tokens: float = 1.0
    """An rBlock's way to the host's memory and back."""


class Pace:
    """Owner of what steps have shown. It is told how long they took."""

    def __init__(self, host_copy_seconds: float = 0.0) -> None:
        """`host_copy_seconds`: in which an rBlock goes to the host's memory and back; 0: none
        does."""
        self.steps = StepTime()
        """Of decodes."""
        self.prompt = 0.0
        """Measured seconds per prompt token; 0 where nothing was measured."""
        self.exchange = 0.0
        """Measured seconds that remote rBlocks add to a decode step; 0 likewise."""
        self.calibration = Calibration()
        self._host_copy_seconds = host_copy_seconds
        self._exchanges = 0
        """Decode steps that had any."""

    @property
    def speed(self) -> Speed:
        """All that was measured."""
        steps = self.steps
        known = steps.observations >= SETTLED
        model = (steps.fixed, steps.per_token, steps.per_kv) if known else (0.0, 0.0, 0.0)
        return Speed(*model, self.prompt, self.exchange)

    def note(self, work: StepWork, seconds: StepSeconds) -> None:
        """Take the measured time of a step."""
        own = seconds.total - seconds.partial_wait - seconds.beside
        if work.prompt_work:
            rest = own - self.steps.predict(work.decodes, work.kv_tokens)
            self.prompt = smoothed(self.prompt, max(0.0, rest) / work.prompt_work)
        elif own > 0:
            self.steps.observe(work.decodes, work.kv_tokens, own)
            if work.exchanging:
                self._exchanges += 1
                weight = 1 / min(self._exchanges, EXCHANGES)
                self.exchange += weight * (seconds.partial_wait - self.exchange)
        if prompt := self.prompt:
            known = self.calibration
            self.calibration = Calibration(
                self.steps.fixed / prompt or known.step_tokens,
                self.exchange / prompt or known.exchange_tokens,
                self._host_copy_seconds / prompt or known.block_tokens,
            )


def smoothed(average: float, value: float) -> float:
    """The moving average after one more value; the first value starts it."""
    return 0.9 * average + 0.1 * value if average else value
