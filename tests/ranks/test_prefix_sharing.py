"""Rows with equal prefixes: the same tokens as if each were alone, and less to compute."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import BLOCK, Outcome, greedy, options, run, run_cluster, tiny_decoder
from seeded_schedule import SeededSchedule
from workloads import DOCUMENT, document_rows, tokens

from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.pace import StepWork
from hpc_distkv.decide.plan import Scheduled
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.rope import Rope
from hpc_distkv.model.weights import load_decoder, random_decoder
from hpc_distkv.ranks.loop import StepLoop
from hpc_distkv.step import shared

ALL_AT_ONCE = {"max_num_seqs": 64, "max_num_batched_tokens": 512}


@pytest.fixture(autouse=True)
def all_is_attended_to_together(monkeypatch) -> None:
    monkeypatch.setattr(shared, "LEAST_SAVED", 0)


def choices_of(prompts: int, n: int, rng: random.Random) -> list[Request]:
    """n answers to each of some prompts."""
    texts = [pack_tokens(tokens(rng.randint(60, 120), rng)) for _ in range(prompts)]
    return [
        Request(number, texts[number // n], Sampling(20, 0.9, seed=number))
        for number in range(prompts * n)
    ]


def apart(model: Decoder, rows: list[Request]) -> Outcome:
    return run_cluster(model, rows, 1, options(4000, enable_prefix_caching=False, **ALL_AT_ONCE))


def total(outcome: Outcome, counter: str) -> int:
    return sum(getattr(counters, counter) for counters in outcome.counters)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("ranks", "blocks"), [(1, 4000), (1, 40), (3, 60), (3, 14)])
@pytest.mark.parametrize("make", [document_rows, choices_of])
def test_rows_that_share_get_the_tokens_of_rows_that_do_not(
    model, steady_pace, make, ranks, blocks, seed
):
    rows = make(3, 5, random.Random(seed))
    alone = apart(model, rows)
    found = run_cluster(model, rows, ranks, options(blocks), SeededSchedule(seed))
    assert found.tokens == alone.tokens
    if blocks == 14:  # so little that rows are preempted, and computed again
        assert total(found, "blocks_borrowed")
    else:
        assert total(found, "prompt_tokens") < total(alone, "prompt_tokens")


def test_a_document_is_computed_once_and_so_is_what_two_documents_have_in_common(model):
    rows = document_rows(2, 12, random.Random(0))
    found = run_cluster(model, rows, 1, options(4000, **ALL_AT_ONCE))
    own = sum(row.prompt_len - DOCUMENT for row in rows)
    assert total(found, "prompt_tokens") == DOCUMENT + DOCUMENT // 2 + own
    assert total(found, "cached_tokens") == sum(row.prompt_len for row in rows) - (
        DOCUMENT + DOCUMENT // 2 + own
    )


def test_all_answers_to_a_prompt_share_its_full_rblocks(model):
    rows = choices_of(1, 8, random.Random(1))
    found = run_cluster(model, rows, 1, options(4000, **ALL_AT_ONCE))
    length = rows[0].prompt_len
    own = length - (length - 1) // BLOCK * BLOCK
    assert total(found, "prompt_tokens") == length + 7 * own


def test_lent_rblocks_are_shared_too(model, steady_pace):
    """The document is longer than a pool: its rows cannot but attend to what is lent. Some go
    on with what others have computed."""
    rng = random.Random(3)
    text = tokens(20 * BLOCK, rng)
    rows = [
        Request(number, pack_tokens(text + tokens(5, rng)), Sampling(24, seed=number))
        for number in range(6)
    ]
    alone = apart(model, rows)
    found = run_cluster(model, rows, 3, options(18), SeededSchedule(0))
    assert found.tokens == alone.tokens
    assert total(found, "blocks_borrowed")
    assert total(found, "cached_tokens") >= len(text)


def test_without_prefix_caching_every_row_computes_all_of_its_prompt(model):
    rows = document_rows(1, 6, random.Random(0))
    off = run_cluster(model, rows, 1, options(4000, enable_prefix_caching=False))
    assert total(off, "prompt_tokens") == sum(row.prompt_len for row in rows)
    assert total(off, "cached_tokens") == 0


def test_where_keys_depend_on_the_length_of_a_prompt_only_equal_lengths_share():
    rng = random.Random(0)
    rope = Rope(type="dynamic", factor=4.0, original_max_position=40)
    dynamic = random_decoder(replace(tiny_decoder().config, rope=rope), "float32")
    text = tokens(64, rng)
    rows = [
        Request(number, pack_tokens(text + tokens(extra, rng)), Sampling(8, seed=number))
        for number, extra in enumerate([9, 9, 14])
    ]
    alone, found = apart(dynamic, rows), run_cluster(dynamic, rows, 1, options(4000))
    assert found.tokens == alone.tokens
    assert total(found, "cached_tokens") == 64


@pytest.mark.parametrize("seed", range(2))
def test_the_lanes_of_an_instance_share_alike(tiny_model: Path, steady_pace, seed):
    rows = greedy(document_rows(2, 8, random.Random(seed)))
    alone = apart(load_decoder(tiny_model, ModelConfig.from_dir(tiny_model)), rows)
    found = run(tiny_model, rows, 4, 2, SeededSchedule(seed), num_blocks=15)
    assert found.tokens == alone.tokens
    assert total(found, "cached_tokens")
    assert total(found, "blocks_borrowed")


@pytest.mark.parametrize("policy", ["lend-greedy", "queue", "isolated", "migrate"])
def test_rows_share_under_every_policy_but_migrate(model, policy):
    rows = document_rows(2, 10, random.Random(7))
    alone = apart(model, rows)
    found = run_cluster(model, rows, 2, options(40, policy=policy))
    assert found.tokens == alone.tokens
    assert (total(found, "cached_tokens") > 0) == (policy != "migrate")


def test_the_work_of_a_step_is_what_its_rows_attend_to_at_home_and_compute(
    model, steady_pace, monkeypatch
):
    """Of decodes every token in their rBlocks here, once; of prompts every token and its place."""
    seen = []
    counted = StepLoop._work

    def watch(loop: StepLoop, rows: list[Scheduled]) -> StepWork:
        rm, places, per_row = loop.instance.rm, {}, loop._attention_tokens
        decodes = [sequence for sequence, count in rows if count == 1]
        for sequence in decodes:
            for table in (*rm.prefixes.chain(sequence.id), rm.tables[sequence.id]):
                for index, slot in zip(table.indices, table.slots, strict=True):
                    places[slot] = min(BLOCK, sequence.length - BLOCK * index)
        prompts = [range(s.computed, s.computed + count) for s, count in rows if count > 1]
        work = sum(1 + (place + 0.5) / per_row for chunk in prompts for place in chunk)
        found = counted(loop, rows)
        assert (found.decodes, found.kv_tokens) == (len(decodes), sum(places.values()))
        assert found.prompt_work == pytest.approx(work)
        seen.append(found)
        return found

    monkeypatch.setattr(StepLoop, "_work", watch)
    rows = document_rows(2, 8, random.Random(0))
    found = run_cluster(model, rows, 3, options(20), SeededSchedule(0))
    assert total(found, "blocks_borrowed")
    assert total(found, "cached_tokens")
    assert {step.exchanging for step in seen} == {False, True}
    assert sum(step.decodes for step in seen) > 0 < sum(step.prompt_work for step in seen)
