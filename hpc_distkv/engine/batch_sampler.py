"""The next tokens of many rows at once, on the device that has their logits.

The same tokens as `sampler.sample` draws row by row, up to the rounding of sums: the same order of
rules, the same generator, the same places in the same cumulative weights. Everything is asked for
at once and nothing is waited for; numbers of the host go there in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from hpc_distkv.comm.device import Device
from hpc_distkv.engine.penalties import TokenCounts
from hpc_distkv.engine.sequence import Sequence

NO_TOKEN = -1
"""Drawn from logits that are not finite: NaN, an infinite one, or none that is not -inf."""
DRAWN_TOGETHER = 32
"""Rows that are drawn at once: bounds the memory of sorted weights."""


def sample_together(
    device: Device, logits: Tensor, sequences: Rows[Sequence], before: Tensor | None = None
) -> Tensor:
    """int64 `[sequences]` on the device, NO_TOKEN included; `logits`: float32 `[sequences, vocab]`,
    left as it is; `before`, on the device: tokens that the host does not know yet (see
    `Sequence.expect`), of sequences that are `foreseeable`."""
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
    settings = device.upload(_settings([*plain, *rest], sequences, logits.shape[1]))
    for draw, first, end in (
        (_draw, 0, len(plain)),
        (_draw_sorted, len(plain), len(drawing)),
    ):
        for start in range(first, end, DRAWN_TOGETHER):
            part = slice(start, min(start + DRAWN_TOGETHER, end))
            rows, *numbers = (setting[part] for setting in settings)
            scores = logits[rows]
            drawn = draw(scores, *numbers)
            # Without one finite logit there is nothing to draw from.
            some = scores.amax(dim=-1).isfinite()
            tokens[rows] = torch.where(some, drawn, tokens[rows])
    return tokens.where(finite, NO_TOKEN)


def _settings(rows: list[int], sequences: Rows[Sequence], vocab: int) -> list[Tensor]:
    """int64 rows; float64 uniform numbers, temperatures, min-p and top-p, int64 top-k, all `[n, 1]`
    but the first. All rows have `draws`."""
    samplings = [sequences[row].request.sampling for row in rows]
    drawing = [(s.draws, s.length) for s in map(sequences.__getitem__, rows)]
    uniforms = [draws.at(length) for draws, length in drawing if draws]
    numbers = (
        uniforms,
        [s.temperature for s in samplings],
        [s.rules.min_p if s.rules else 0.0 for s in samplings],
        [s.top_p for s in samplings],
    )
    return [
        torch.tensor(rows, dtype=torch.int64),
        *(torch.tensor(values, dtype=torch.float64)[:, None] for values in numbers),
        torch.tensor([s.top_k or vocab for s in samplings], dtype=torch.int64)[:, None],
    ]


def _weights(scores: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """float64, not normalised; the most probable token weighs 1."""
    shifted = (scores - scores.amax(dim=-1, keepdim=True)).double()
    weights = shifted.div_(temperature).exp_()
    return weights.masked_fill_(weights < min_p, 0.0)


def _draw(
    scores: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_p: Tensor,
    top_k: Tensor,
) -> Tensor:
    """From all tokens of non-zero weight."""
    cumulative = _weights(scores, temperature, min_p).cumsum(dim=-1)
    return _place(cumulative, uniform, cumulative[:, -1:])[:, 0]


def _draw_sorted(
    scores: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_p: Tensor,
    top_k: Tensor,
) -> Tensor:
    """From the most probable tokens: `top_k` of them, and of these as many as weigh `top_p`."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    weights = _weights(scores, temperature, min_p).gather(1, order)
    places = torch.arange(scores.shape[1], device=scores.device)
    cumulative = weights.masked_fill_(places >= top_k, 0.0).cumsum(dim=-1)
    last = torch.searchsorted(cumulative, top_p * cumulative[:, -1:])
    kept = cumulative.gather(1, last.clamp_(max=scores.shape[1] - 1))
    return order.gather(1, _place(cumulative, uniform, kept))[:, 0]


def _place(cumulative: Tensor, uniform: Tensor, total: Tensor) -> Tensor:
    """Where a part `uniform` of `total` is reached, `[n, 1]`; never beyond the last token that has
    any weight, should the product have been rounded up."""
    place = torch.searchsorted(cumulative, uniform * total, right=True)
    place = torch.minimum(place, torch.searchsorted(cumulative, total.contiguous()))
    return place.clamp_(max=cumulative.shape[1] - 1)  # Where the weights are no numbers.


def _adjusted(
    device: Device, logits: Tensor, sequences: Rows[Sequence], before: Tensor | None
) -> Tensor:
    """As `penalties.adjusted`, for all rows."""
    vocab = logits.shape[1]
    unknown: list[tuple[int, int, float]] = []
    """Row, the place of its last token in `before`, and its penalty for repetition."""
    bias, withheld, repeated, output = _Edits(vocab), _Edits(vocab), _Edits(vocab), _Edits(vocab)
    for row, sequence in enumerate(sequences):
        rules = sequence.request.sampling.rules
        if rules is None:
            continue
        for token, added in rules.logit_bias:
            bias.add(row, np.array([token]), added)
        if sequence.output_len < sequence.request.sampling.min_tokens:
            withheld.add(row, np.array(rules.withheld, np.int64))
        if isinstance(sequence.counts, TokenCounts):
            sequence.counts.read(sequence.tokens)
            if rules.repetition_penalty != 1.0:
                repeated.add(row, sequence.counts.seen.numpy(), rules.repetition_penalty)
                if sequence.tokens[-1] < 0:
                    unknown.append((row, -1 - sequence.tokens[-1], rules.repetition_penalty))
            if rules.frequency_penalty or rules.presence_penalty:
                ids, times = sequence.counts.output
                frequencies = np.float32(rules.frequency_penalty) * times.numpy()
                output.add(row, ids.numpy(), frequencies, rules.presence_penalty)
    edits = (bias, withheld, repeated, output)
    rows, places, penalties = zip(*unknown, strict=True) if unknown else ((), (), ())
    numbers = torch.tensor([rows, places], dtype=torch.int64), torch.tensor(penalties)
    parts = iter(device.upload([*numbers, *(part for edit in edits for part in edit.tensors())]))
    (rows_there, places_there), penalties_there = next(parts), next(parts)
    logits = logits.clone()
    flat = logits.view(-1)
    at, value, _ = next(parts), next(parts), next(parts)
    flat[at] += value
    at, value, _ = next(parts), next(parts), next(parts)
    flat.index_fill_(0, at, -torch.inf)
    at, penalty, _ = next(parts), next(parts), next(parts)
    if before is not None and unknown:  # A token that was seen before as well is set twice.
        at = torch.cat((at, rows_there * vocab + before[places_there]))
        penalty = torch.cat((penalty, penalties_there))
    seen = flat[at]
    flat[at] = torch.where(seen > 0, seen / penalty, seen * penalty)
    at, frequency, presence = next(parts), next(parts), next(parts)
    flat[at] = flat[at] - frequency - presence
    return logits


class _Edits:
    """Changes of one kind: places in the flat logits, and up to two float32 numbers for each."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(
        self,
        row: int,
        tokens: np.ndarray,
        value: np.ndarray | float = 0.0,
        other: np.ndarray | float = 0.0,
    ) -> None:
        """Of `tokens` of one row."""
        values = [np.broadcast_to(np.asarray(v, np.float32), tokens.shape) for v in (value, other)]
        self._parts.append((row * self._vocab + tokens, values[0], values[1]))

    def tensors(self) -> list[Tensor]:
        """int64, float32 and float32, of one length."""
        if not self._parts:
            return [torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)]
        return [torch.from_numpy(np.concatenate(part)) for part in zip(*self._parts, strict=True)]
