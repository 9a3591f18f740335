"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hpc_distkv.comm.device import Device
from hpc_distkv.control.messages.requests import LogitRules, Sampling, pack_logprobs
from hpc_distkv.decide.sequence import TokenCounts, TokenSequence
from hpc_distkv.step.batch_sampler import NO_TOKEN, sample_together
from hpc_distkv.step.draws import Ids, Weights, draw_keys, race

SORTED = 256
"""Weights at most that are sorted at once, without dropping light ones first."""


Sampled = tuple[list[int], dict[int, bytes]]
"""The next token of each sequence, or NO_TOKEN; request → the record (`pack_logprobs`) of its new
token, for those that ask for it."""


NOBODY_DRAWN = torch.empty(0, dtype=torch.int64)


class Draw(NamedTuple):
    """The next tokens of some sequences, still being computed."""

    tokens: torch.Tensor
    """int64 `[sequences]`, on a deferred device (else empty); any token in place of NO_TOKEN."""
    ready: Callable[[], Sampled | None]
    """Returns the tokens once the device has finished the draw, None before. Never blocks."""


def begin_sampling(
    device: Device,
    logits: torch.Tensor,
    sequences: Sequence[TokenSequence],
    before: torch.Tensor | None = None,
) -> Draw:
    """Ask `device` for the next tokens. `logits`: float32 `[sequences, vocab]`; `before`: the
    tokens that the step before draws, if the host does not know them."""
    if not sequences:
        over = device.fetch([])
        return Draw(NOBODY_DRAWN, lambda: None if over.ready() is None else ([], {}))
    if not device.deferred:
        tokens = sample(logits, sequences)
        sampled = tokens, sample_logprobs(logits, sequences, tokens)
        return Draw(NOBODY_DRAWN, lambda: sampled)  # the host has what it drew
    sampled_there = sample_together(device, logits, sequences, before)
    drawn = sampled_there.clamp(min=0)
    groups = _asking(sequences)
    uploaded = device.upload([torch.tensor(rows) for rows in groups.values()]) if groups else []
    scores = [
        part
        for top, rows in zip(groups, uploaded, strict=True)
        for part in _scores(logits[rows], drawn[rows], top)
    ]
    fetch = device.fetch([sampled_there, *scores])

    def ready() -> Sampled | None:
        if (fetched := fetch.ready()) is None:
            return None
        parts = iter(fetched[1:])
        records: dict[int, bytes] = {}
        for rows in groups.values():
            packed = _pack(next(parts), next(parts), next(parts))
            records.update(zip((sequences[row].id for row in rows), packed, strict=True))
        return fetched[0].tolist(), records

    return Draw(drawn, ready)


def sample(logits: torch.Tensor, sequences: Sequence[TokenSequence]) -> list[int]:
    """The next token of each sequence, or NO_TOKEN; `logits` is float32 `[sequences, vocab]`, left
    as it is.

    Noise (`draws`) follows from a row's seed and the position alone: not from batch, rank,
    preemption or restart.
    """
    largest, best = logits.max(dim=-1)
    tokens: list[int] = best.where(largest.isfinite(), NO_TOKEN).tolist()
    samplings = [sequence.request.sampling for sequence in sequences]
    rows = [
        row
        for row, sampling in enumerate(samplings)
        if tokens[row] != NO_TOKEN and (sampling.temperature > 0 or sampling.rules)
    ]
    keys = draw_keys([(samplings[row].seed, sequences[row].length) for row in rows])
    for row, key in zip(rows, keys, strict=True):
        tokens[row] = _choose(logits[row], sequences[row], key)
    return tokens


def sample_logprobs(
    logits: torch.Tensor, sequences: Sequence[TokenSequence], tokens: Sequence[int]
) -> dict[int, bytes]:
    """Request → the record (`pack_logprobs`) of its new token, for those that ask for it: from the
    logits as the model made them, before any rule or temperature."""
    found: dict[int, bytes] = {}
    for top, rows in _asking(sequences).items():
        drawn = torch.tensor([tokens[row] for row in rows]).clamp(min=0)
        records = _pack(*_scores(logits[rows], drawn, top))
        found.update(zip((sequences[row].id for row in rows), records, strict=True))
    return found


def _asking(sequences: Sequence[TokenSequence]) -> dict[int, list[int]]:
    """Alternatives to report → the rows that ask for so many."""
    asked: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if (top := sequence.request.sampling.logprobs) is not None:
            asked.setdefault(top, []).append(row)
    return asked


def _scores(
    logits: torch.Tensor, drawn: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-probabilities `[rows]` of the `drawn` tokens; the `top` most probable ones' ids and
    log-probabilities `[rows, top]`."""
    scores = logits.log_softmax(dim=-1)
    own = scores.gather(1, drawn[:, None])[:, 0]
    values, ids = scores.topk(top)
    return own, ids, values


def _pack(own: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> list[bytes]:
    return pack_logprobs(own.numpy(), ids.numpy(), values.numpy())


def _choose(logits: torch.Tensor, sequence: TokenSequence, key: Ids) -> int:
    """The next token of one row: its rules, then a draw, or without temperature the largest."""
    sampling = sequence.request.sampling
    if sampling.rules:
        if sequence.counts:
            sequence.counts.read(sequence.tokens)
        begun = sequence.output_len >= sampling.min_tokens
        logits = adjusted(logits, sampling.rules, sequence.counts, begun)
    if sampling.temperature > 0 and logits.max().isfinite():
        return race(key, token_weights(logits, sampling))
    return int(logits.argmax())


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


def token_weights(logits: torch.Tensor, sampling: Sampling) -> Weights:
    """What each token is drawn by, `[vocab]`, not normalised; 0 for those that are not drawn: by
    temperature, then min-p, then top-k, then top-p of what is left. As in vLLM, tokens as probable
    as the last of the `top_k` are among them."""
    scores = logits.numpy()
    if not 0 < sampling.top_k < len(scores):
        return _weights(scores, sampling)
    last = logits.topk(sampling.top_k).values[-1].numpy()
    tokens = np.flatnonzero(scores >= last)
    weights = np.zeros(len(scores))
    weights[tokens] = _weights(scores[tokens], sampling)
    return weights


def _weights(scores: npt.NDArray[np.float32], sampling: Sampling) -> Weights:
    """`token_weights` of these alone, without top-k; the most probable one is among them."""
    weights: Weights = np.divide(scores - scores.max(), sampling.temperature, dtype=np.float64)
    np.exp(weights, out=weights)
    if sampling.min_p:
        weights[weights < sampling.min_p] = 0.0  # The most probable token weighs 1.
    if sampling.top_p >= 1:
        return weights
    kept, nucleus = _nucleus(weights, sampling.top_p), np.zeros(len(weights))
    nucleus[kept] = weights[kept]
    return nucleus


def _nucleus(weights: Weights, top_p: float) -> Ids:
    """Places of as few of the largest as weigh `top_p` of all; of equal ones the first. To sort a
    whole vocabulary would cost more than a small model's step, so most of it goes before: those
    that weigh less than the average of what may be left out are left out together."""
    places, wanted = np.arange(len(weights)), top_p * weights.sum()
    while len(weights) > SORTED:
        heavy = weights >= (weights.sum() - wanted) / len(weights)
        if 2 * np.count_nonzero(heavy) > len(weights):
            break
        places, weights = places[heavy], weights[heavy]
    order = np.argsort(-weights, kind="stable")
    count = np.searchsorted(np.cumsum(weights[order]), wanted) + 1
    return places[order[:count]]
