"""Sampling against the distribution it must draw from, as transformers' own classes make it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hpc_distkv.control.messages.requests import (
    LogitRules,
    Request,
    Sampling,
    pack_tokens,
    unpack_logprobs,
)
from hpc_distkv.decide.sequence import TokenCounts, TokenSequence
from hpc_distkv.step.sampler import adjusted, sample, sample_logprobs, token_weights

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.9, 0.0, -3.0])
VOCABULARY = 3000
DRAWN = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.3},
    {"temperature": 0.7, "min_p": 0.1, "top_k": 3, "top_p": 0.9},
]


def sequence(
    sampling: Sampling, position: int = 1, output: tuple[int, ...] = (), number: int = 0
) -> TokenSequence:
    """A sequence whose next token is its `position`-th."""
    prompt = [0] * (position - len(output))
    made = TokenSequence(Request(number, pack_tokens(prompt), sampling), assigned_at=0.0)
    for token in output:
        made.expect(0)
        made.learn(token, 0.0)
    return made


def settings_of(sampling: dict[str, float], **others) -> Sampling:
    rules = LogitRules(min_p=sampling["min_p"]) if "min_p" in sampling else None
    others = {"max_tokens": 1, "seed": 7, "rules": rules} | sampling | others
    return Sampling(**{name: others[name] for name in others if name != "min_p"})


def draw(sampling: dict[str, float], times: int = 4000, **others) -> np.ndarray:
    settings = settings_of(sampling, **others)
    rows = [sequence(settings, position) for position in range(1, times + 1)]
    return np.bincount(sample(LOGITS.repeat(times, 1), rows), minlength=6) / times


def expected(logits: torch.Tensor, sampling: dict[str, float]) -> np.ndarray:
    """The distribution by transformers' classes, in vLLM's order."""
    steps = [TemperatureLogitsWarper(sampling["temperature"])]
    if "min_p" in sampling:
        steps.append(MinPLogitsWarper(sampling["min_p"]))
    if "top_k" in sampling:
        steps.append(TopKLogitsWarper(int(sampling["top_k"])))
    if "top_p" in sampling:
        steps.append(TopPLogitsWarper(sampling["top_p"]))
    scores = logits[None].double()
    for step in steps:
        scores = step(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("sampling", DRAWN)
def test_frequencies_follow_the_distribution(sampling):
    assert np.abs(draw(sampling) - expected(LOGITS, sampling)).max() < 0.03


@pytest.mark.parametrize("seed", range(40))
def test_the_distribution_is_that_of_transformers(seed):
    rng = random.Random(seed)
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    settings = {"temperature": rng.uniform(0.2, 2)}
    if rng.random() < 0.5:
        settings["min_p"] = rng.choice([0.001, 0.05, 0.5, 1.0])
    if rng.random() < 0.5:
        settings["top_k"] = rng.choice([1, 7, 500, VOCABULARY - 1])
    if rng.random() < 0.7:
        settings["top_p"] = rng.choice([0.01, 0.5, 0.95, 0.9999])
    weights = token_weights(logits, settings_of(settings))
    assert weights / weights.sum() == pytest.approx(expected(logits, settings), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_penalties_are_those_of_vllm(seed):
    """Repetition against transformers; presence and frequency, of the output alone, in numpy."""
    rng = random.Random(seed)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    prompt, output = (rng.choices(range(50), k=rng.randint(n, 30)) for n in (1, 0))
    rules = LogitRules(
        repetition_penalty=rng.choice([1.0, 0.8, 1.7]),
        frequency_penalty=rng.choice([0.0, 0.5, -1.0]),
        presence_penalty=rng.choice([0.0, 1.5, -0.5]),
        logit_bias=((3, 5.0), (7, -100.0)),
        withheld=(11, 12),
    )
    counts = TokenCounts(len(prompt))
    for end in (rng.randint(0, len(output)), len(output)):  # It catches up.
        counts.read([*prompt, *output][: len(prompt) + end])
    begun = rng.random() < 0.5
    found = adjusted(logits, rules, counts, begun)

    biased = logits.clone()
    biased[3] += 5.0
    biased[7] -= 100.0
    if not begun:
        biased[[11, 12]] = -torch.inf
    repetition = RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)
    scores = repetition(torch.tensor([[*prompt, *output]]), biased[None])[0].double().numpy()
    times = np.bincount(np.array(output, int), minlength=50)
    scores -= rules.frequency_penalty * times + rules.presence_penalty * (times > 0)
    assert found.numpy() == pytest.approx(scores, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_tokens_as_probable_as_the_last_of_the_most_probable_are_among_them(top_k):
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -torch.inf])
    settings = {"temperature": 0.8, "top_k": top_k}
    weights = token_weights(logits, settings_of(settings))
    assert weights / weights.sum() == pytest.approx(expected(logits, settings), abs=1e-9)


def test_of_equal_tokens_those_of_the_lowest_ids_are_enough_for_top_p():
    weights = token_weights(torch.zeros(1000), settings_of({"temperature": 1.0, "top_p": 0.3}))
    assert np.flatnonzero(weights).tolist() == list(range(300))


def test_temperature_zero_takes_the_largest():
    assert sample(LOGITS[None], [sequence(Sampling(max_tokens=1), 5)]) == [0]


def test_rules_hold_without_temperature_too():
    def greedy(output: tuple[int, ...] = (), min_tokens: int = 0, **rules) -> int:
        settings = Sampling(max_tokens=9, min_tokens=min_tokens, rules=LogitRules(**rules))
        return sample(LOGITS[None], [sequence(settings, 8, output)])[0]

    assert greedy(logit_bias=((5, 100.0),)) == 5
    assert greedy(logit_bias=((0, -100.0),)) == 3
    assert greedy((0,), presence_penalty=1.0) == 3
    assert greedy((1,), presence_penalty=1.0) == 0
    assert greedy((0, 0), frequency_penalty=0.06) == 3
    assert greedy((0,), frequency_penalty=0.06) == 0
    assert greedy(repetition_penalty=1.5) == 3, "the prompt has token 0"
    assert greedy((3,), repetition_penalty=1.5) == 0, "both are in the sequence"
    assert greedy((3,), 2, withheld=(0, 3)) == 2
    assert greedy((3, 3), 2, withheld=(0, 3)) == 0


def test_a_masked_token_is_never_drawn_and_a_row_without_any_left_goes_on():
    rules = LogitRules(withheld=(0, 3))
    frequencies = draw({"temperature": 1.0}, min_tokens=1, rules=rules)
    assert frequencies[[0, 3]].tolist() == [0, 0]
    everything = LogitRules(withheld=tuple(range(6)))
    assert draw({"temperature": 1.0}, 3, min_tokens=1, rules=everything).sum() == 1


def test_logits_are_left_as_they_are():
    logits = LOGITS.repeat(2, 1)
    rules = LogitRules(logit_bias=((5, 100.0),))
    settings = Sampling(max_tokens=1, temperature=1.0, rules=rules)
    assert sample(logits, [sequence(settings)] * 2) == [5, 5]
    assert torch.equal(logits, LOGITS.repeat(2, 1))


def test_a_token_depends_on_seed_and_position_only():
    hot = Sampling(max_tokens=1, temperature=5.0, seed=3)
    other = Sampling(max_tokens=1, temperature=5.0, seed=4)
    places = range(1, 51)
    alone = [sample(LOGITS[None], [sequence(hot, p)])[0] for p in places]
    rows = [sequence(settings, p) for p in places for settings in (hot, other)]
    mixed = sample(LOGITS.repeat(100, 1), rows)
    assert mixed[::2] == alone
    assert mixed[1::2] != alone


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4
    rules = LogitRules(logit_bias=((5, 100.0),))
    asked = [None, 0, 3, 20, 3]
    rows = [
        sequence(Sampling(1, 0.5, seed=i, logprobs=top, rules=rules), number=i)
        for i, top in enumerate(asked)
    ]
    tokens = sample(logits, rows)
    assert tokens == [5] * 5
    found = sample_logprobs(logits, rows, tokens)
    assert found.keys() == {1, 2, 3, 4}
    x = logits.double().numpy()
    oracle = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    for row, packed in found.items():
        [record] = unpack_logprobs(packed, asked[row])
        assert record.logprob == pytest.approx(oracle[row, 5], abs=1e-5)
        best = np.argsort(-oracle[row])[: asked[row]]
        assert [token for token, _ in record.top] == best.tolist()
        assert [value for _, value in record.top] == pytest.approx(oracle[row, best], abs=1e-5)


def test_logprobs_do_not_depend_on_the_batch():
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2))
    rows = [sequence(Sampling(1, logprobs=top), number=top) for top in (1, 2, 5, 20)]
    tokens = sample(logits, rows)
    together = sample_logprobs(logits, rows, tokens)
    for i, row in enumerate(rows):
        assert sample_logprobs(logits[i : i + 1], [row], tokens[i : i + 1]) == {
            row.id: together[row.id]
        }
