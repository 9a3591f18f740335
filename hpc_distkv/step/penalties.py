"""What a request's rules make of its logits before a token is drawn."""

from __future__ import annotations

import torch

from hpc_distkv.control.messages.requests import LogitRules
from hpc_distkv.decide.token_counts import TokenCounts


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
        ids = torch.from_numpy(counts.seen)
        seen = logits[ids]
        penalty = rules.repetition_penalty
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if rules.frequency_penalty or rules.presence_penalty:
        ids, times = map(torch.from_numpy, counts.output)
        logits[ids] -= rules.frequency_penalty * times
        logits[ids] -= rules.presence_penalty
