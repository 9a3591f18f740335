"""Rows go where the beginning of their prompt is, as long as that is worth it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from gmanager_rounds import assignment_of
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.assign import assignment
from hpc_distkv.control.assign.assignment import STEP, Affinity
from hpc_distkv.control.assign.queue import SyncSource
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens

BLOCK, PLENTY = 4, 10**6


def request(number: int, tokens: list[int], output: int = 1) -> Request:
    return Request(number, pack_tokens(tokens), Sampling(max_tokens=output))


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=90), max_size=6), st.data())
def test_it_finds_the_longest_beginning_that_was_given_within_an_eighth(prompts, data):
    known = Affinity(BLOCK)
    for number, prompt in enumerate(prompts):
        known.give(request(number, prompt), number)
    start = data.draw(st.sampled_from(prompts)) if prompts else []
    prompt = start + data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=30))
    holders, tokens = known.find(request(99, prompt))
    # The rBlock of a last token is never shared, so a prompt's end does not count.
    shared = {n: min(common(prompt, p), len(prompt) - 1, len(p) - 1) for n, p in enumerate(prompts)}
    assert all(shared[holder] >= tokens for holder in holders)
    best = max(shared.values(), default=0) // BLOCK * BLOCK
    assert tokens <= best <= tokens + tokens // STEP + BLOCK
    assert bool(holders) == bool(tokens)


def test_what_was_given_longest_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(assignment, "MOST_KEYS", 5)
    known = Affinity(BLOCK)
    for number in range(9):
        known.give(request(number, [number] * 6), number)
    found = [known.find(request(99, [number] * 6)) for number in range(9)]
    assert found == [([], 0)] * 4 + [([number], BLOCK) for number in range(4, 9)]


def assign(rows: list[Request], instances: int, sharing: bool = True) -> dict[int, list[int]]:
    room = np.full(instances, PLENTY)
    assignment = assignment_of(
        SyncSource(rows), instances, block_size=BLOCK, enable_prefix_caching=sharing
    )
    given_rows = {}
    while assignment.waiting:
        for instance, some in assignment.assign(room, room, np.zeros(instances)).items():
            given_rows.setdefault(instance, []).extend(row.id for row in some)
    return given_rows


def questions(documents: int, each: int, length: int, output: int) -> list[Request]:
    rng = random.Random(0)
    texts = [[rng.randrange(99) for _ in range(length)] for _ in range(documents)]
    return [
        request(number, texts[number % documents] + [number] * 8, output)
        for number in range(documents * each)
    ]


def test_all_rows_of_a_document_go_to_one_instance_if_there_are_documents_for_all():
    rows = questions(documents=6, each=5, length=400, output=4)
    given_rows = assign(rows, 3)
    homes = [{n for n, some in given_rows.items() if d in {i % 6 for i in some}} for d in range(6)]
    assert [len(home) for home in homes] == [1] * 6
    assert sorted(map(len, given_rows.values())) == [10, 10, 10]


@pytest.mark.parametrize("output", [4, 50, 400])
def test_an_instance_is_never_ahead_of_another_by_more_than_a_document_and_a_row(output):
    rows = questions(documents=1, each=40, length=400, output=output)
    given_rows = assign(rows, 4)
    computed = {n: 400 + len(some) * (8 + output) for n, some in given_rows.items()}
    idle = 0 if len(computed) < 4 else min(computed.values())
    assert max(computed.values()) - idle <= 400 + 2 * (400 + 8 + output)
    if output == 400:
        assert sorted(map(len, given_rows.values())) == [10, 10, 10, 10]


def test_where_nothing_is_shared_rows_go_where_they_go_without_it():
    rng = random.Random(1)
    rows = [request(n, [n, *range(rng.randint(1, 60))], rng.randint(1, 60)) for n in range(60)]
    assert assign(rows, 4) == assign(rows, 4, sharing=False)
