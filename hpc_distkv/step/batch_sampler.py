"""The next tokens of many rows at once, on the device that has their logits.

The same tokens as `sampler.sample` draws row by row, but for near ties: the same order of rules and
the same races. Everything is asked for at once and nothing is waited for; numbers of the host go
there in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpc_distkv.comm.device import Device
from hpc_distkv.decide.sequence import TokenCounts, TokenSequence
from hpc_distkv.step.draws import Races, draw_keys

NO_TOKEN = -1
"""Drawn from logits that are not finite: NaN, an infinite one, or none that is not -inf."""
DRAWN_TOGETHER = 32
"""Rows that are drawn at once: bounds the memory of sorted weights."""


def sample_together(
    device: Device, logits: Tensor, sequences: Sequence[TokenSequence], before: Tensor | None = None
) -> Tensor:
    """int64 `[sequences]` on the device, NO_TOKEN included; `logits`: float32 `[sequences, vocab]`,
    left as it is; `before`, on the device: tokens that the host does not know yet (see
    `TokenSequence.expect`), of sequences whose penalties count no tokens."""
    samplings = [sequence.request.sampling for sequence in sequences]
    largest, tokens = logits.max(dim=-1)
    if any(sampling.rules for sampling in samplings):
        logits = _adjusted(device, logits, sequences, before)
        tokens = logits.argmax(dim=-1)
    drawing = [row for row, s in enumerate(samplings) if s.temperature > 0]
    finite = largest.isfinite()
    if not drawing:
        return tokens.where(finite, NO_TOKEN)
    plain = [row for row in drawing if samplings[row].top_k == 0 and samplings[row].top_p >= 1]
    rest = sorted({*drawing}.difference(plain))
    settings = _settings([*plain, *rest], sequences, logits.shape[1])
    rows, keys, *numbers = device.upload(settings)
    races = Races(keys, logits.shape[1])
    for weights, first, end in (
        (_weights, 0, len(plain)),
        (_sorted_weights, len(plain), len(drawing)),
    ):
        for start in range(first, end, DRAWN_TOGETHER):
            part = slice(start, min(start + DRAWN_TOGETHER, end))
            scores = logits[rows[part]]
            races.add(weights(scores, *(column[part] for column in numbers)))
    # Without one finite logit there is nothing to draw from.
    some = logits.amax(dim=-1)[rows].isfinite()
    tokens[rows] = torch.where(some, races.winners(), tokens[rows])
    return tokens.where(finite, NO_TOKEN)


def _settings(rows: list[int], sequences: Sequence[TokenSequence], vocab: int) -> list[Tensor]:
    """int64 rows; int64 keys, float64 temperatures, min-p and top-p, int64 top-k, all `[n, 1]` but
    the first."""
    samplings = [sequences[row].request.sampling for row in rows]
    lengths = [sequences[row].length for row in rows]
    keys = draw_keys([(s.seed, length) for s, length in zip(samplings, lengths, strict=True)])
    numbers = (
        np.array([s.temperature for s in samplings]),
        np.array([s.min_p for s in samplings]),
        np.array([s.top_p for s in samplings]),
        np.array([s.top_k or vocab for s in samplings]).clip(max=vocab),
    )
    columns = (torch.from_numpy(column)[:, None] for column in numbers)
    return [torch.tensor(rows), torch.from_numpy(keys), *columns]


def _weights(
    scores: Tensor, temperature: Tensor, min_p: Tensor, top_p: Tensor, top_k: Tensor
) -> Tensor:
    """float64 weights of all tokens, not normalised; the most probable one weighs 1."""
    shifted = (scores - scores.amax(dim=-1, keepdim=True)).double()
    weights = shifted.div_(temperature).exp_()
    return weights.masked_fill_(weights < min_p, 0.0)


def _sorted_weights(
    scores: Tensor, temperature: Tensor, min_p: Tensor, top_p: Tensor, top_k: Tensor
) -> Tensor:
    """Of the most probable tokens alone: `top_k` of them and those as probable as the last of
    these, and of all these as many as weigh `top_p`."""
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    weights = _weights(scores, temperature, min_p, top_p, top_k)
    weights.masked_fill_(scores < scores.gather(1, top_k - 1), 0.0)
    cumulative = weights.cumsum(dim=-1)
    last = torch.searchsorted(cumulative, top_p * cumulative[:, -1:])
    places = torch.arange(scores.shape[1], device=scores.device)
    weights.masked_fill_(places > last, 0.0)
    return cumulative.scatter_(1, order, weights)


def _adjusted(
    device: Device, logits: Tensor, sequences: Sequence[TokenSequence], before: Tensor | None
) -> Tensor:
    """As `sampler.adjusted`, for all rows."""
    edits = _edits(sequences, logits.shape[1])
    numbers = iter(device.upload([tensor for kind in edits for tensor in kind.tensors()]))
    biased, withheld, repeated, unknown, counted = (
        [next(numbers) for _ in range(kind.columns)] for kind in edits
    )
    logits = logits.clone()
    flat = logits.view(-1)
    at, bias = biased
    flat[at] += bias
    (at,) = withheld
    flat.index_fill_(0, at, -torch.inf)
    at, penalty = repeated
    first, penalties, places = unknown
    if before is not None and len(first):  # A token that was seen before as well is set twice.
        at = torch.cat((at, first + before[places]))
        penalty = torch.cat((penalty, penalties))
    seen = flat[at]
    flat[at] = torch.where(seen > 0, seen / penalty, seen * penalty)
    at, frequency, presence = counted
    flat[at] = flat[at] - frequency - presence
    return logits


def _edits(sequences: Sequence[TokenSequence], vocab: int) -> list[_Edits]:
    """In the order in which rules apply: biases; tokens that are withheld; those that are there,
    with the penalty for repetition; likewise the first places of rows whose last token is not known
    yet, with its place among the tokens before; and those in outputs, with what frequency and
    presence take off."""
    biased, withheld, repeated = _Edits(np.float32), _Edits(), _Edits(np.float32)
    unknown, counted = _Edits(np.float32, np.int64), _Edits(np.float32, np.float32)
    for row, sequence in enumerate(sequences):
        rules, first = sequence.request.sampling.rules, row * vocab
        if rules is None:
            continue
        for token, bias in rules.logit_bias:
            biased.add(first, [token], bias)
        if sequence.output_len < sequence.request.sampling.min_tokens:
            withheld.add(first, rules.withheld)
        if isinstance(sequence.counts, TokenCounts):
            sequence.counts.read(sequence.tokens)
            if rules.repetition_penalty != 1.0:
                repeated.add(first, sequence.counts.seen, rules.repetition_penalty)
                if (last := sequence.tokens[-1]) < 0:
                    unknown.add(first, [0], rules.repetition_penalty, -1 - last)
            if rules.frequency_penalty or rules.presence_penalty:
                ids, times = sequence.counts.output
                frequency = np.float32(rules.frequency_penalty) * times
                counted.add(first, ids, frequency, rules.presence_penalty)
    return [biased, withheld, repeated, unknown, counted]


class _Edits:
    """Changes of one kind: places in the flat logits, and numbers for each."""

    def __init__(self, *kinds: type[np.generic]) -> None:
        """`kinds` of the numbers."""
        self._kinds: tuple[type[np.generic], ...] = (np.int64, *kinds)
        self._parts = [[np.empty(0, kind) for kind in self._kinds]]

    @property
    def columns(self) -> int:
        """Tensors that they make."""
        return len(self._kinds)

    def add(
        self, first: int, tokens: np.ndarray | Sequence[int], *numbers: np.ndarray | float
    ) -> None:
        """Of `tokens` of the row whose logits begin at `first`."""
        at = first + np.asarray(tokens, np.int64)
        columns = (np.asarray(n, k) for n, k in zip(numbers, self._kinds[1:], strict=True))
        self._parts.append([at, *(np.broadcast_to(column, at.shape) for column in columns)])

    def tensors(self) -> list[Tensor]:
        """The places, int64, and the numbers: all of one length."""
        return [torch.from_numpy(np.concatenate(part)) for part in zip(*self._parts, strict=True)]
