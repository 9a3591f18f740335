"""How fast one instance is, as its steps have shown."""

from __future__ import annotations

import math
from typing import NamedTuple

from hpc_distkv.control.messages.requests import STEP_TOKENS

KEEP = 0.995
"""What an observation still counts after the next one: the last few hundred steps matter."""
SMOOTHING = 0.05
"""Weight of the newest prediction in the mean error."""
TRUSTED = 3.0
"""Misses up to this many mean errors count in full, larger ones in inverse proportion (Huber)."""
NOISE = 0.1
"""Misses that count in full however good the predictions were."""
SWEEPS = 4
"""Rounds of coordinate descent per observation: enough, since each starts at the last estimate."""


class StepTime:
    """The model T = fixed + per_token · sequences + per_kv · kv_tokens of a decode step in seconds:
    W(β)/f(β) + Σ S/g of Infinite-LLM (arXiv 2401.02669v2), with coefficients that are never
    negative.

    Least squares of relative errors with forgetting. Kept are the moments of the observations,
    from which coordinate descent moves the estimate on. It needs no scaling of sequences against
    tokens, and what the observations do not tell stays as it was: at first a step takes what the
    last one took.
    """

    def __init__(self) -> None:
        self.observations = 0
        self.error = 1.0
        """Smoothed mean of |predicted − measured| / measured of predictions made before each
        observation, each at most 1."""
        self._estimate = [0.0, 0.0, 0.0]
        self._moments = [[0.0, 0.0, 0.0] for _ in range(3)]
        self._targets = [0.0, 0.0, 0.0]

    @property
    def fixed(self) -> float:
        """Seconds of any step."""
        return self._estimate[0]

    @property
    def per_token(self) -> float:
        """Seconds per sequence."""
        return self._estimate[1]

    @property
    def per_kv(self) -> float:
        """Seconds per token of KV attended to."""
        return self._estimate[2]

    def predict(self, sequences: int, kv_tokens: int) -> float:
        """Seconds of a step of so many sequences that attend to `kv_tokens` tokens in all; 0
        before the first observation."""
        fixed, per_token, per_kv = self._estimate
        return fixed + per_token * sequences + per_kv * kv_tokens

    def observe(self, sequences: int, kv_tokens: int, seconds: float) -> None:
        """Learn from one step. Raises ValueError for a time that is not positive."""
        if not 0 < seconds < math.inf or sequences < 0 or kv_tokens < 0:
            raise ValueError(f"a step of {sequences} sequences, {kv_tokens} tokens and {seconds} s")
        predicted = self.predict(sequences, kv_tokens)
        miss = min(1.0, abs(predicted - seconds) / seconds)
        trust = min(1.0, max(NOISE, TRUSTED * self.error) / miss) if miss else 1.0
        # Over the larger one: a rare step of a tiny prediction must not outweigh all others.
        self._remember((1.0, sequences, kv_tokens), seconds, trust / max(predicted, seconds) ** 2)
        self._descend()
        self.error += SMOOTHING * (miss - self.error)
        self.observations += 1

    def _remember(self, x: tuple[float, float, float], seconds: float, weight: float) -> None:
        a, b, c = x
        for i, row in enumerate(self._moments):
            w = weight * x[i]
            row[0] = KEEP * row[0] + w * a
            row[1] = KEEP * row[1] + w * b
            row[2] = KEEP * row[2] + w * c
            self._targets[i] = KEEP * self._targets[i] + w * seconds

    def _descend(self) -> None:
        """Each coefficient in turn to the least error that the other two allow."""
        estimate = self._estimate
        for _ in range(SWEEPS):
            for i, (a, b, c) in enumerate(self._moments):
                if curvature := self._moments[i][i]:
                    slope = self._targets[i] - a * estimate[0] - b * estimate[1] - c * estimate[2]
                    estimate[i] = max(0.0, estimate[i] + slope / curvature)


EXCHANGES = 500
"""Decode steps with an exchange of which the mean counts: a wait is short or long by what the
creditor computes meanwhile."""
SETTLED = 16
"""Decode steps before their model counts as known: loans for gain must not follow noise."""


class StepWork(NamedTuple):
    """What a step had to compute."""

    decodes: int
    """Sequences in decode."""
    kv_tokens: int
    """KV tokens at home that they attended to."""
    prompt_work: float
    """Prompt tokens computed, weighted as in `control.messages.requests.work`."""
    exchanging: bool
    """Whether sequences had rBlocks at creditors."""


class Speed(NamedTuple):
    """Measured seconds of one instance; 0 where nothing was measured."""

    fixed: float
    """Of a decode step, whatever its sequences."""
    per_token: float
    """Of a decode step, per sequence."""
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
            seen = max(0.0, rest) / work.prompt_work
            self.prompt = 0.9 * self.prompt + 0.1 * seen if self.prompt else seen
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
