"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hpc_distkv.control.messages import Sampling

HEAD = 1024
"""Tokens that are sorted first for top-p: nearly always more than it keeps."""


def sample(
    logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]
) -> list[int]:
    """The next token of each row of `logits` (float32 `[rows, vocab]`); `positions` is the place
    in its sequence that each token will take.

    Randomness comes from a counter-based generator (Philox4x64) keyed by the row's seed with the
    position as its counter, so a token depends on the row, its seed and its position alone: not
    on batch, rank, preemption or restart.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True)):
        if sampling.temperature > 0:
            tokens[row] = _draw(logits[row], sampling, position)
    return tokens


def _draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Temperature, then top-k, then top-p of what is left, then one uniform number."""
    order, weights = _candidates(logits, sampling)
    cumulative = np.cumsum(weights)
    uniform = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    place = min(place, len(weights) - 1)
    return place if order is None else int(order[place])


def _candidates(
    logits: torch.Tensor, sampling: Sampling
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64]]:
    """The tokens that may be drawn (None: all) and their weights, not normalised. Sorting the
    whole vocabulary would cost more than a small model's step, so as little is sorted as will do.
    """
    vocab = len(logits)
    weights = np.exp((logits - logits.max()).double().numpy() / sampling.temperature)
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
