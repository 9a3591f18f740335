"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hpc_distkv.comm.device import Device
from hpc_distkv.control.logprobs import pack_logprobs
from hpc_distkv.control.requests import Sampling
from hpc_distkv.engine.batch_sampler import NO_TOKEN, sample_together
from hpc_distkv.engine.penalties import adjusted
from hpc_distkv.engine.sequence import Sequence

HEAD = 1024
"""Tokens that are sorted first for top-p: nearly always more than it keeps."""


Sampled = tuple[list[int], dict[int, bytes]]
"""The next token of each sequence, or NO_TOKEN; request → the record (`control.logprobs`) of its
new token, for those that ask for it."""


NOBODY_DRAWN = torch.empty(0, dtype=torch.int64)


class Draw(NamedTuple):
    """The next tokens of some sequences, on their way."""

    tokens: torch.Tensor
    """int64 `[sequences]`, on a device that works by itself; any token in place of NO_TOKEN."""
    ready: Callable[[], Sampled | None]
    """Gives them once all that the device was asked for until the draw is done, and None until
    then. Never blocks."""


def begin_sampling(
    device: Device,
    logits: torch.Tensor,
    sequences: Rows[Sequence],
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


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """The next token of each sequence, or NO_TOKEN; `logits` is float32 `[sequences, vocab]`, left
    as it is.

    Randomness comes from `Draws`, so a token depends on the row, its seed and its position alone:
    not on batch, rank, preemption or restart.
    """
    largest, best = logits.max(dim=-1)
    tokens: list[int] = best.where(largest.isfinite(), NO_TOKEN).tolist()
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if tokens[row] != NO_TOKEN and (sampling.temperature > 0 or sampling.rules):
            tokens[row] = _choose(logits[row], sequence)
    return tokens


def sample_logprobs(
    logits: torch.Tensor, sequences: Rows[Sequence], tokens: Rows[int]
) -> dict[int, bytes]:
    """Request → the record (`control.logprobs`) of its new token, for those that ask for it: from
    the logits as the model made them, before any rule or temperature."""
    found: dict[int, bytes] = {}
    for top, rows in _asking(sequences).items():
        drawn = torch.tensor([tokens[row] for row in rows]).clamp(min=0)
        records = _pack(*_scores(logits[rows], drawn, top))
        found.update(zip((sequences[row].id for row in rows), records, strict=True))
    return found


def _asking(sequences: Rows[Sequence]) -> dict[int, list[int]]:
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


def _choose(logits: torch.Tensor, sequence: Sequence) -> int:
    """The next token of one row: its rules, then a draw, or without temperature the largest."""
    sampling = sequence.request.sampling
    if sampling.rules:
        if sequence.counts:
            sequence.counts.read(sequence.tokens)
        begun = sequence.output_len >= sampling.min_tokens
        logits = adjusted(logits, sampling.rules, sequence.counts, begun)
    if sequence.draws and logits.max().isfinite():
        return _draw(logits, sampling, sequence.draws.at(sequence.length))
    return int(logits.argmax())


def _draw(logits: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """Temperature, then min-p, then top-k, then top-p of what is left, then one uniform number."""
    order, weights = candidates(logits, sampling)
    cumulative = np.cumsum(weights)
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
