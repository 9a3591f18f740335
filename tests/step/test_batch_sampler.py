"""Sampling of all rows at once against sampling row by row."""

from __future__ import annotations

import random

import pytest
import torch
from test_sampler import sequence

from hpc_distkv.comm.device import Device, Fetch
from hpc_distkv.control.messages.requests import LogitRules, Sampling
from hpc_distkv.step.batch_sampler import NO_TOKEN, sample_together
from hpc_distkv.step.sampler import begin_sampling, sample, sample_logprobs

VOCABULARY = 500


class Elsewhere(Device):
    """A device that ends nothing before it is told."""

    deferred = True
    over = False

    def query(self) -> bool:
        return self.over

    def fetch(self, tensors):
        return Fetch(list(tensors), self)


def random_sampling(rng: random.Random) -> Sampling:
    rules = None
    if rng.random() < 0.6:
        rules = LogitRules(
            repetition_penalty=rng.choice([1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            presence_penalty=rng.choice([0.0, -0.7]),
            logit_bias=rng.choice([(), ((3, 2.5), (499, -100.0))]),
            withheld=rng.choice([(), (5, 7)]),
            min_p=rng.choice([0.0, 0.05]),
        )
    return Sampling(
        max_tokens=9,
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_p=rng.choice([1.0, 0.9, 0.2]),
        top_k=rng.choice([0, 1, 40]),
        seed=rng.randrange(1000),
        min_tokens=rng.choice([0, 50]),
        logprobs=rng.choice([None, None, 0, 3]),
        rules=rules,
    )


def random_rows(seed: int, count: int):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        output = tuple(rng.choices(range(VOCABULARY), k=rng.randint(0, 8)))
        rows.append(sequence(random_sampling(rng), len(output) + 2, output, number))
    generator = torch.Generator().manual_seed(seed)
    return rows, 3 * torch.randn(count, VOCABULARY, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(2))
def test_the_tokens_are_those_drawn_row_by_row(seed, dtype):
    """Also where many logits are equal."""
    rows, logits = random_rows(seed, 800)
    logits = logits.to(dtype).float()
    before = logits.clone()
    assert sample_together(Device(), logits, rows).tolist() == sample(logits, rows)
    assert torch.equal(logits, before)


def test_a_token_that_the_host_does_not_know_yet_is_penalised_as_a_known_one():
    rows, waiting = [], []
    drawn = torch.tensor([9, 3, 250, 7])
    for number, place in enumerate([2, 0, 1, 3, 2]):
        rules = LogitRules(repetition_penalty=4.0, min_p=0.1)
        sampling = Sampling(9, [0.0, 1.0][number % 2], seed=number, rules=rules)
        earlier = (9, 3, 8)
        token = int(drawn[place])
        rows.append(sequence(sampling, 5, (*earlier, token), number))
        waiting.append(sequence(sampling, 4, earlier, number))
        waiting[-1].expect(place)
    logits = torch.randn(5, VOCABULARY)
    for row, known in enumerate(rows):
        logits[row, known.tokens[-1]] = 5.0  # without the penalty it would be drawn again
    want = sample(logits, rows)
    assert sample_together(Device(), logits, waiting, drawn).tolist() == want
    for row, token in zip(waiting, want, strict=True):
        assert row.tokens[-1] < 0
        row.learn(int(drawn[-1 - row.tokens[-1]]), 0.0)
        row.expect(0)
        row.learn(token, 0.0)
    for row, token in zip(rows, want, strict=True):
        row.expect(0)
        row.learn(token, 0.0)
    assert sample_together(Device(), logits, waiting).tolist() == sample(logits, rows)


def test_a_row_without_a_finite_logit_is_drawn_as_alone():
    hot = Sampling(max_tokens=1, temperature=1.0, top_k=3)
    rows = [sequence(hot, number=0), sequence(hot, number=1)]
    logits = torch.randn(2, VOCABULARY)
    logits[0] = -torch.inf
    tokens = sample(logits, rows)
    assert tokens[0] == NO_TOKEN != tokens[1]
    assert sample_together(Device(), logits, rows).tolist() == tokens


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rules", [None, LogitRules(logit_bias=((3, 2.0),))])
def test_rows_of_logits_that_are_not_finite_get_no_token_and_others_do(bad, rules):
    rows = [
        sequence(Sampling(1, heat, logprobs=2, rules=rules), number=number)
        for number, heat in enumerate([0.0, 0.0, 1.0, 1.0])
    ]
    logits = torch.randn(4, VOCABULARY)
    logits[::2, 123] = bad
    tokens = sample(logits, rows)
    assert [token == NO_TOKEN for token in tokens] == [True, False, True, False]
    device = Elsewhere()
    draw = begin_sampling(device, logits, rows)
    device.over = True
    assert draw.ready()[0] == tokens
    assert draw.tokens.min() >= 0, "the next step may have begun with them"


def test_what_is_drawn_is_there_once_the_device_has_come_to_it():
    rows, logits = random_rows(9, 30)
    device = Elsewhere()
    ready = begin_sampling(device, logits, rows).ready
    assert ready() is None
    device.over = True
    tokens, records = ready()
    assert tokens == sample(logits, rows)
    assert records == sample_logprobs(logits, rows, tokens)
    assert records


def test_a_step_without_new_tokens_ends_when_the_device_has_come_to_its_end():
    device = Elsewhere()
    ready = begin_sampling(device, torch.empty((0, 0)), []).ready
    assert ready() is None
    device.over = True
    assert ready() == ([], {})
