"""Batches of requests that press on a cluster, each in its own way, and checks of its answers."""

from __future__ import annotations

import random
from collections.abc import Sequence as Ids

import pytest
from clusters import BLOCK, VOCABULARY, Outcome, options, request
from decoding import Decoding
from families import prompt

from hpc_distkv.control.messages.requests import (
    LogitRules,
    Request,
    Sampling,
    pack_tokens,
    unpack_logprobs,
)
from hpc_distkv.ranks.rank import EngineOptions


def migrating_rows(seed: int, ranks: int = 3) -> list[Request]:
    """Rows that need twice the memory of all ranks; each fits on any of them."""
    rng = random.Random(seed)
    pool = 24 * 8
    rows: list[Request] = []
    total = 0
    while total < 2 * ranks * pool:
        longest = rng.choice([40, 40, 100, pool - 40])
        prompt, output = rng.randint(1, longest), rng.randint(1, 40)
        rows.append(request(len(rows), prompt, output, rng))
        total += prompt + output
    return rows


def migrations(outcome: Outcome) -> int:
    return sum(counters.migrations for counters in outcome.counters)


class Letters(Decoding):
    """Every token is one or two letters."""

    def decode(self, ids: Ids[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcdefgh"[i % 8] + "xyz"[i % 3] * (i % 2) for i in ids)


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


def sampled_rows(count: int, longest: int, rng: random.Random) -> list[Request]:
    made = []
    for number in range(count):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        made.append(Request(number, pack_tokens(prompt), sampled(number, rng.randint(5, 60), rng)))
    return made


def check_same(found: Outcome, expected: Outcome, requests: list[Request]) -> None:
    assert found.ids == expected.ids == [asked.id for asked in requests]
    assert found.tokens == expected.tokens
    for asked in requests:
        one, other = found.results[asked.id], expected.results[asked.id]
        assert (one.finish_reason, one.text_end) == (other.finish_reason, other.text_end)
        if (top := asked.sampling.logprobs) is None:
            assert one.logprobs == b""
            continue
        ours, theirs = (unpack_logprobs(result.logprobs, top) for result in (one, other))
        assert len(ours) == len(found.tokens[asked.id])
        for here, there in zip(ours, theirs, strict=True):
            assert here.logprob == pytest.approx(there.logprob, abs=1e-3)
            # What is as likely may change places.
            assert [value for _, value in here.top] == pytest.approx(
                [value for _, value in there.top], abs=1e-3
            )


DOCUMENT = 160


def tokens(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def document_rows(documents: int, rows: int, rng: random.Random) -> list[Request]:
    """Questions about documents, in turn; some documents begin alike, too."""
    start = tokens(DOCUMENT // 2, rng)
    texts = [start + tokens(DOCUMENT // 2, rng) for _ in range(documents)]
    return [
        Request(
            number,
            pack_tokens(texts[number % documents] + tokens(rng.randint(1, 3 * BLOCK), rng)),
            Sampling(rng.randint(1, 30), rng.choice([0.0, 0.9]), seed=number),
        )
        for number in range(rows)
    ]


def stopping(count: int, rng: random.Random) -> list[Request]:
    """Rows that may end at any token."""
    rows = []
    for number in range(count):
        prompt = pack_tokens([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 90))])
        stop = tuple(rng.sample(range(VOCABULARY), 12))
        sampling = Sampling(
            rng.randint(1, 40),
            rng.choice([0.0, 0.9]),
            rng.choice([1.0, 0.9]),
            seed=number,
            stop_token_ids=stop,
            min_tokens=rng.choice([0, 0, 9]),
            logprobs=rng.choice([None, None, 2]),
        )
        rows.append(Request(number, prompt, sampling))
    return rows


def windowed_rows(seed: int, capacity: int) -> list[Request]:
    """Rows of very uneven length that need twice the capacity (tokens)."""
    rng = random.Random(seed)
    rows: list[Request] = []
    total = 0
    while total < 2 * capacity:
        longest = min(rng.choice([40, 40, 150, capacity]), capacity - 40)
        tokens, output = rng.randint(1, longest), rng.randint(1, 40)
        sampling = Sampling(output, rng.choice([0.0, 0.9]), seed=len(rows))
        rows.append(Request(len(rows), pack_tokens(prompt(tokens, len(rows))), sampling))
        total += tokens + output
    return rows


BLOCK_BYTES = 2 * 2 * 2 * 16 * BLOCK * 4
"""Of `model`: layers, K and V, KV heads, head dimension."""


STOPS = tuple(range(12))


def tier(blocks: int, host_blocks: int, **others: object) -> EngineOptions:
    return options(blocks, host_kv_memory=host_blocks * BLOCK_BYTES, **others)


def crowd(rng: random.Random, count: int, capacity: int) -> list[Request]:
    """Rows of which a few need most of the capacity (tokens), some share a document, and some stop
    early, so that others last longer than was expected."""
    document = [rng.randrange(VOCABULARY) for _ in range(capacity)]
    rows = []
    for number in range(count):
        longest = capacity - 1 if rng.random() < 0.2 else min(60, capacity - 1)
        length = rng.randint(1, longest)
        tokens = [rng.randrange(VOCABULARY) for _ in range(length)]
        if rng.random() < 0.4:
            shared = rng.randint(0, length)
            tokens[:shared] = document[:shared]
        output = min(rng.randint(1, 60), capacity - length + 1)
        stops = STOPS if rng.random() < 0.6 else ()
        sampling = Sampling(output, rng.choice([0.0, 1.0]), seed=number, stop_token_ids=stops)
        rows.append(Request(number, pack_tokens(tokens), sampling))
    return rows


def pressed() -> list[Request]:
    """The first rows end early, so that more of the others begin than there is room for."""
    rng, rows = random.Random(5), []
    for number in range(16):
        tokens = [rng.randrange(VOCABULARY) for _ in range(40)]
        early = number < 8
        sampling = Sampling(60, 1.0 if early else 0.0, seed=number, stop_token_ids=STOPS * early)
        rows.append(Request(number, pack_tokens(tokens), sampling))
    return rows
