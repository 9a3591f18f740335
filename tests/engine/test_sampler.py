"""Sampling against the distribution it must draw from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_distkv.control.messages import Sampling
from hpc_distkv.engine.sampler import sample

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, 0.0, -3.0])


def draw(sampling: dict[str, float], times: int = 4000) -> np.ndarray:
    rows = LOGITS.repeat(times, 1)
    settings = [Sampling(max_tokens=1, seed=7, **sampling)] * times
    return np.bincount(sample(rows, settings, range(times)), minlength=6) / times


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 4, "top_p": 0.9},
    ],
)
def test_frequencies_follow_the_distribution(sampling):
    p = np.exp(LOGITS.double().numpy() / sampling["temperature"])
    order = np.argsort(-p)
    keep = order[: int(sampling.get("top_k", 6))]
    q = p[keep] / p[keep].sum()
    before = np.cumsum(q) - q
    keep = keep[before < sampling.get("top_p", 1.0)]
    expected = np.zeros(6)
    expected[keep] = p[keep] / p[keep].sum()
    assert np.abs(draw(sampling) - expected).max() < 0.03


def test_temperature_zero_takes_the_largest():
    assert sample(LOGITS[None], [Sampling(max_tokens=1)], [5]) == [0]


def test_a_token_depends_on_seed_and_position_only():
    hot = Sampling(max_tokens=1, temperature=5.0, seed=3)
    other = Sampling(max_tokens=1, temperature=5.0, seed=4)
    alone = [sample(LOGITS[None], [hot], [p])[0] for p in range(50)]
    mixed = sample(LOGITS.repeat(100, 1), [hot, other] * 50, [p for p in range(50) for _ in "ab"])
    assert mixed[::2] == alone
    assert mixed[1::2] != alone
