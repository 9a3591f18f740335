"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch

from hpc_distkv.control.logprobs import pack_logprobs
from hpc_distkv.control.messages import Sampling
from hpc_distkv.engine.penalties import adjusted
from hpc_distkv.engine.sequence import Sequence

HEAD = 1024
"""Tokens that are sorted first for top-p: nearly always more than it keeps."""


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence; `logits` is float32 `[sequences, vocab]`, left as it is.

    Randomness comes from a counter-based generator (Philox4x64) keyed by the row's seed with the
    token's position as its counter, so a token depends on the row, its seed and its position
    alone: not on batch, rank, preemption or restart.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sampling.temperature > 0 or sampling.rules:
            tokens[row] = _choose(logits[row].cpu(), sequence)
    return tokens


def sample_logprobs(
    logits: torch.Tensor, sequences: Rows[Sequence], tokens: Rows[int]
) -> dict[int, bytes]:
    """Request → the record (`control.logprobs`) of its new token, for those that ask for it: from
    the logits as the model made them, before any rule or temperature."""
    found: dict[int, bytes] = {}
    asked: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if (top := sequence.request.sampling.logprobs) is not None:
            asked.setdefault(top, []).append(row)
    for top, rows in asked.items():
        scores = logits[rows].log_softmax(dim=-1)
        drawn = torch.tensor([[tokens[row]] for row in rows], device=scores.device)
        own = scores.gather(1, drawn)[:, 0]
        values, ids = scores.topk(top)
        records = pack_logprobs(*(part.cpu().numpy() for part in (own, ids, values)))
        found.update(zip((sequences[row].id for row in rows), records, strict=True))
    return found


def _choose(logits: torch.Tensor, sequence: Sequence) -> int:
    """The next token of one row: its rules, then a draw, or without temperature the largest."""
    sampling = sequence.request.sampling
    if sampling.rules:
        if sequence.counts:
            sequence.counts.read(sequence.tokens)
        begun = sequence.output_len >= sampling.min_tokens
        logits = adjusted(logits, sampling.rules, sequence.counts, begun)
    if sampling.temperature > 0 and logits.max().isfinite():
        return _draw(logits, sampling, sequence.length)
    return int(logits.argmax())


def _draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Temperature, then min-p, then top-k, then top-p of what is left, then one uniform number."""
    order, weights = candidates(logits, sampling)
    cumulative = np.cumsum(weights)
    uniform = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # Not beyond the last token that has any weight, should the product have been rounded up.
    place = min(place, int(np.searchsorted(cumulative, cumulative[-1])))
    return place if order is None else int(order[place])


def candidates(
    logits: torch.Tensor, sampling: Sampling
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64]]:
    """The tokens that may be drawn (None: all) and their weights, not normalised. Sorting the
    whole vocabulary would cost more than a small model's step, so as little is sorted as will do.
    """
    vocab = len(logits)
    weights = np.exp((logits - logits.max()).double().numpy() / sampling.temperature)
    if sampling.rules:
        weights[weights < sampling.rules.min_p] = 0.0  # The most probable token weighs 1.
    if sampling.top_k == 0 and sampling.top_p >= 1:
        return None, weights
    count = min(sampling.top_k or HEAD, vocab)
    total = weights.sum()
    while True:
        order = logits.topk(count).indices.numpy()
        kept = weights[order]
        cumulative = np.cumsum(kept)
        if sampling.top_k:
            total = cumulative[-1]
        if count == vocab or sampling.top_k or cumulative[-1] >= sampling.top_p * total:
            break
        count = min(8 * count, vocab)
    keep = int(np.searchsorted(cumulative, sampling.top_p * total)) + 1
    return order[:keep], kept[:keep]
