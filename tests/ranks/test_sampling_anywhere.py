"""A row with any sampling fields gets the same tokens, the same end and the same logprobs in any
batch, on any number of ranks, preempted, handed over or neither."""

from __future__ import annotations

import random
from collections.abc import Sequence as Ids

import pytest
from clusters import Outcome, run_cluster
from decoding import Decoding
from test_cluster import BLOCK, VOCABULARY, options, tiny_decoder

from hpc_distkv.comm.local.schedule import SeededSchedule
from hpc_distkv.control.messages.requests import LogitRules, Request, Sampling, pack_tokens
from hpc_distkv.control.messages.token_logprobs import unpack_logprobs
from hpc_distkv.model.decoder import Decoder


class Letters(Decoding):
    """Every token is one or two letters."""

    def decode(self, ids: Ids[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcdefgh"[i % 8] + "xyz"[i % 3] * (i % 2) for i in ids)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


def sampled(number: int, max_tokens: int, rng: random.Random) -> Sampling:
    """Some of all fields."""
    rules = LogitRules(
        repetition_penalty=rng.choice([1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        presence_penalty=rng.choice([0.0, -0.5]),
        logit_bias=((rng.randrange(VOCABULARY), 5.0),),
        withheld=(1, 2, 3),
        min_p=rng.choice([0.0, 0.02]),
    )
    return Sampling(
        max_tokens,
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        seed=number,
        stop_token_ids=(1, 2, 3),
        min_tokens=rng.choice([0, 10]),
        stop=rng.choice([(), ("bd", "gxa"), ("xb", "ff")]),
        logprobs=rng.choice([None, 0, 4]),
        rules=rng.choice([None, rules]),
    )


def rows(count: int, longest: int, rng: random.Random) -> list[Request]:
    made = []
    for number in range(count):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        made.append(Request(number, pack_tokens(prompt), sampled(number, rng.randint(5, 60), rng)))
    return made


def check_same(found: Outcome, expected: Outcome, requests: list[Request]) -> None:
    assert found.ids == expected.ids == [request.id for request in requests]
    assert found.tokens == expected.tokens
    for request in requests:
        one, other = found.results[request.id], expected.results[request.id]
        assert (one.finish_reason, one.text_end) == (other.finish_reason, other.text_end)
        if (top := request.sampling.logprobs) is None:
            assert one.logprobs == b""
            continue
        ours, theirs = (unpack_logprobs(result.logprobs, top) for result in (one, other))
        assert len(ours) == len(found.tokens[request.id])
        for here, there in zip(ours, theirs, strict=True):
            assert here.logprob == pytest.approx(there.logprob, abs=1e-3)
            # What is as likely may change places.
            assert [value for _, value in here.top] == pytest.approx(
                [value for _, value in there.top], abs=1e-3
            )


def alone(model: Decoder, requests: list[Request]) -> Outcome:
    """Row by row, each in a batch of its own."""
    return run_cluster(model, requests, 1, options(400, max_num_seqs=1), decoder=Letters())


def test_any_batch_any_ranks_and_preemption(model):
    preemptions = matches = 0
    for seed in range(4):
        requests = rows(24, 40, random.Random(seed))
        expected = alone(model, requests)
        matches += sum(result.text_end is not None for result in expected.results.values())
        for ranks, blocks in ((1, 4000), (1, 13), (3, 13)):
            outcome = run_cluster(model, requests, ranks, options(blocks), decoder=Letters())
            check_same(outcome, expected, requests)
            preemptions += sum(counters.preemptions for counters in outcome.counters)
    assert preemptions > 0
    assert matches > 4


def test_rows_that_are_handed_over(model, steady_pace):
    migrations = 0
    for seed in range(6):
        requests = rows(30, 60, random.Random(seed))
        expected = run_cluster(model, requests, 1, options(4000), decoder=Letters())
        small, schedule = options(20, policy="migrate"), SeededSchedule(seed)
        outcome = run_cluster(model, requests, 3, small, schedule, decoder=Letters())
        check_same(outcome, expected, requests)
        migrations += sum(counters.migrations for counters in outcome.counters)
    assert migrations > 0


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_messages(model, seed):
    requests = rows(20, 8 * BLOCK, random.Random(seed))
    schedule = SeededSchedule(seed)
    outcome = run_cluster(model, requests, 3, options(14), schedule, decoder=Letters())
    check_same(outcome, alone(model, requests), requests)
