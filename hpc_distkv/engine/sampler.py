"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hpc_distkv.control.messages import Sampling


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
            tokens[row] = _draw(logits[row].double().numpy(), sampling, position)
    return tokens


def _draw(logits: npt.NDArray[np.float64], sampling: Sampling, position: int) -> int:
    """Temperature, then top-k, then top-p of what is left, then one uniform number."""
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    scaled = logits[order] / sampling.temperature
    cumulative = np.cumsum(np.exp(scaled - scaled[0]))
    if sampling.top_p < 1:
        keep = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:keep]
    uniform = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    return int(order[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])
