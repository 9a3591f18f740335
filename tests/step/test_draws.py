"""The randomness of draws against exact probabilities, and what the rounding of logits changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_sampler import sequence

from hpc_distkv.batch.input.rows import derive_seed
from hpc_distkv.bench.draws import places
from hpc_distkv.comm.device import Device
from hpc_distkv.control.messages.requests import LogitRules, Sampling
from hpc_distkv.step.batch_sampler import sample_together
from hpc_distkv.step.draws import Races, draw_keys, noise, race, split
from hpc_distkv.step.sampler import sample, token_weights

VOCABULARY = 600
DRAWS = 20_000
SPLITMIX64_OF_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""As Vigna's splitmix64.c prints them."""


def weights_of(seed: int, vocab: int = VOCABULARY, spread: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, vocab)
    return np.exp(logits - logits.max())


def drawn(seeds, positions, weights: np.ndarray) -> np.ndarray:
    """One token for each pair, all at once."""
    keys = torch.from_numpy(draw_keys([*zip(seeds, positions, strict=True)]))
    races = Races(keys, len(weights))
    for start in range(0, len(keys), 2000):
        rows = len(keys[start : start + 2000])
        races.add(torch.from_numpy(weights).expand(rows, -1).clone())
    return races.winners().numpy()


def deviation(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square of the counts, as a standard normal number (Wilson and Hilferty); what is expected
    fewer than 10 times counts as one."""
    rare = expected < 10
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    freedom = len(counts) - 1
    chi = ((counts - expected) ** 2 / expected).sum() / freedom
    spread = 2 / (9 * freedom)
    return float((chi ** (1 / 3) - (1 - spread)) / spread**0.5)


def test_the_generator_is_splitmix64():
    made = split(np.array([1234567]), np.arange(5))
    assert made.astype(np.uint64).tolist() == SPLITMIX64_OF_1234567


def test_numpy_and_torch_make_the_same_noise():
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63 - 1, (50, 1), endpoint=True)
    ids = rng.integers(-300_000, 300_000, (50, 400))
    ours = noise(keys, ids)
    assert ours.min() >= 0
    assert np.array_equal(noise(torch.from_numpy(keys), torch.from_numpy(ids)).numpy(), ours)


def test_noise_is_uniform_down_to_numbers_that_one_in_a_million_has():
    """The first to arrive is the one with a small number."""
    [numbers] = noise(draw_keys([(3, 8)]), np.arange(1 << 20))
    exponents = np.bincount(np.frexp(numbers / 2.0**63)[1] + 40, minlength=41)
    expected = len(numbers) * 0.5 ** np.arange(41, 0, -1.0)
    assert abs(deviation(exponents, expected)) < 4


GRID = np.arange(DRAWS)


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [(GRID * 0 + 5, GRID + 1), (GRID, GRID * 0 + 9), (GRID // 200, GRID % 200)],
    ids=["one row", "one position of neighbouring seeds", "200 seeds"],
)
def test_draws_follow_the_weights(seeds, positions):
    weights = weights_of(1)
    counts = np.bincount(drawn(seeds, positions, weights), minlength=VOCABULARY)
    assert abs(deviation(counts, DRAWS * weights / weights.sum())) < 4


def test_a_vocabulary_of_rare_tokens_is_drawn_as_often_as_it_should_be():
    weights = np.full(60_000, 1e-6)
    weights[31_000] = 1.0
    keys = draw_keys([(row + 100, row) for row in range(8000)])
    tokens = np.array([race(key, weights) for key in keys])
    rare = tokens[tokens != 31_000]
    expected = 8000 * np.array([1.0, 0.06]) / 1.06
    assert abs(deviation(np.array([8000 - len(rare), len(rare)]), expected)) < 4
    assert abs(deviation(np.bincount(rare // 6000, minlength=10), np.full(10, len(rare) / 10))) < 4


def choices(count: int) -> list[int]:
    return [derive_seed(7, f"choice {choice}") for choice in range(1, count + 1)]


@pytest.mark.parametrize("kind", ["positions", "seeds", "choices"])
def test_neighbours_are_independent(kind):
    """Pairs of tokens at neighbouring positions, of neighbouring seeds, and of the answers of a row
    that asks for several, against the products of their probabilities."""
    weights = weights_of(2, 8, 1.0)
    seeds, positions = GRID * 0 + 3, GRID
    if kind == "seeds":
        seeds, positions = positions, seeds
    elif kind == "choices":
        seeds = np.tile(choices(2), DRAWS // 2)
        positions = GRID // 2
    tokens = drawn(seeds, positions, weights)
    step = 1 if kind != "choices" else 2
    one, other = (tokens[:-1], tokens[1:]) if step == 1 else (tokens[::2], tokens[1::2])
    parts = weights / weights.sum()
    counts = np.bincount(8 * one + other, minlength=64)
    assert abs(deviation(counts, len(one) * np.outer(parts, parts).ravel())) < 4


def test_many_rows_race_as_one_does():
    for vocab in (1, 255, 256, 257, VOCABULARY):
        weights = weights_of(vocab, vocab)
        weights[weights < 0.01] = 0
        keys = draw_keys([(row, vocab) for row in range(300)])
        alone = [race(key, weights) for key in keys]
        assert drawn(range(300), [vocab] * 300, weights).tolist() == alone
        assert weights[alone].min() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 1000},
        {"rules": LogitRules(min_p=1e-3)},
        {"rules": LogitRules(1.2, 0.2, 0.3, ((11, 4.0), (900, -100.0)))},
    ],
    ids=["all tokens", "top-p", "top-k", "min-p", "penalties"],
)
def test_only_a_near_tie_changes_a_draw(settings):
    """Of 1,600 draws with logits that differ by 1e-4 none, where places among cumulative weights
    give several other tokens; one by one and together."""
    generator = torch.Generator().manual_seed(4)
    others = 0
    for seed in range(4):
        logits = torch.randn(20_000, generator=generator) * 3
        rounded = logits + 1e-4 * torch.randn(20_000, generator=generator)
        sampling = Sampling(max_tokens=9, temperature=1.0, seed=seed, **settings)
        rows = [sequence(sampling, 10 + n, (4, 9, 4)) for n in range(400)]
        one, two = (sample(scores.expand(400, -1), rows) for scores in (logits, rounded))
        assert one == two
        together = sample_together(Device(), rounded.expand(400, -1)[:32], rows[:32])
        assert together.tolist() == one[:32]
        uniform = np.random.default_rng(seed).random(400)
        pair = (places(token_weights(scores, sampling), uniform) for scores in (logits, rounded))
        others += np.count_nonzero(np.not_equal(*pair))
    assert others > 5
