"""What a request's rules make of its logits before a token is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from hpc_distkv.control.requests import LogitRules


class TokenCounts:
    """How often the output of one request has each token, and which ones its prompt has. Follows
    from the tokens, and counts only those that are new since the last look."""

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._read = 0
        self._seen: set[int] = set()
        self._output: Counter[int] = Counter()

    def read(self, tokens: Sequence[int]) -> None:
        """`tokens`: of prompt and output so far, more or as many as in the last call; a last one
        that is not known yet (see `Sequence.expect`) is left for the next call."""
        end = len(tokens) - (tokens[-1] < 0)
        self._seen.update(tokens[self._read : end])
        self._output.update(tokens[max(self._read, self._prompt_len) : end])
        self._read = end

    @property
    def seen(self) -> torch.Tensor:
        """int64 ids of the tokens in prompt or output."""
        return torch.from_numpy(np.fromiter(self._seen, np.int64, len(self._seen)))

    @property
    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 ids of the tokens in the output, and float32 times that they are there."""
        ids = np.fromiter(self._output.keys(), np.int64, len(self._output))
        times = np.fromiter(self._output.values(), np.float32, len(self._output))
        return torch.from_numpy(ids), torch.from_numpy(times)


def adjusted(
    logits: torch.Tensor, rules: LogitRules, counts: TokenCounts | None, begun: bool
) -> torch.Tensor:
    """Float32 `logits` `[vocab]` of one row → what is drawn from: the bias is added, tokens are
    withheld until `begun` (the output has its least length), then come the penalties for
    repetition, frequency and presence, which need `counts`. The order is that of vLLM (V1)."""
    logits = logits.clone()
    if rules.logit_bias:
        ids, bias = zip(*rules.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(bias, dtype=logits.dtype)
    if rules.withheld and not begun:
        logits[list(rules.withheld)] = -torch.inf
    if counts is not None:
        _penalise(logits, rules, counts)
    return logits


def _penalise(logits: torch.Tensor, rules: LogitRules, counts: TokenCounts) -> None:
    if rules.repetition_penalty != 1.0:
        ids = counts.seen
        seen = logits[ids]
        penalty = rules.repetition_penalty
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if rules.frequency_penalty or rules.presence_penalty:
        ids, times = counts.output
        logits[ids] -= rules.frequency_penalty * times
        logits[ids] -= rules.presence_penalty
