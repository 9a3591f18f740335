"""Every sampling field through `generate`: alone, on two ranks with little memory, and resumed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from batch_job import BatchJob, chat, completion, random_ids
from mpirun import mpirun

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 3},
    {"temperature": 1.0, "n": 3, "logprobs": 2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.8, "stop": ["e", "\u00e9", "th"], "min_tokens": 4, "n": 2},
    {"stop": "o", "include_stop_str_in_output": True, "temperature": 1.0},
    {"logit_bias": {"40": 8, "50": -100}, "ignore_eos": True, "skip_special_tokens": False},
    {"echo": True, "temperature": 1.2, "stop_token_ids": [70, 71, 72, 73]},
]


def rows() -> list[dict[str, Any]]:
    rng = random.Random(3)
    made = []
    for number in range(42):
        options = OPTIONS[number % len(OPTIONS)]
        prompt = random_ids(rng.randint(3, 90), rng)
        made.append(completion(f"row {number}", prompt, rng.randint(5, 40), **options))
    talk = chat("chat", "Hello.", 12)
    talk["body"] |= {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1.0}
    return [*made, talk]


def choices(job: BatchJob) -> dict[str, Any]:
    """What must be the same wherever a row runs, by custom_id: all but log-probabilities."""
    found = {}
    for line in job.lines():
        assert line["error"] is None, line
        body = line["response"]["body"]
        found[line["custom_id"]] = (
            [
                (choice.get("text", choice.get("message")), choice["finish_reason"])
                for choice in body["choices"]
            ],
            body["usage"],
        )
    assert len(found) == len(job.lines())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> BatchJob:
    job = BatchJob(tmp_path_factory.mktemp("alone"), tiny_model, rows())
    ran = job.run(0)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("min_p 0, repetition_penalty 1") == 1
    return job


def test_the_answers_say_what_was_asked_for(alone: BatchJob) -> None:
    lines = {line["custom_id"]: line["response"]["body"] for line in alone.lines()}
    several = lines["row 1"]["choices"]
    assert len({choice["text"] for choice in several}) == 3
    for choice in several:
        scores = choice["logprobs"]
        assert len(scores["tokens"]) == len(scores["top_logprobs"]) > 0
        assert all(2 <= len(top) <= 3 for top in scores["top_logprobs"])
        for name, own, top in zip(
            scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True
        ):
            assert top[name] == own <= 0
    for number in range(3, 42, 7):
        for choice in lines[f"row {number}"]["choices"]:
            if choice["finish_reason"] == "length":
                continue
            assert not choice["text"].endswith(("e", "th"))
    for number in range(4, 42, 7):
        [choice] = lines[f"row {number}"]["choices"]
        assert ("o" in choice["text"]) == choice["text"].endswith("o")
    for number in range(5, 42, 7):
        assert lines[f"row {number}"]["choices"][0]["finish_reason"] == "length"
    for choice in lines["chat"]["choices"]:
        assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_two_ranks_with_little_memory_answer_the_same(alone, tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, rows())
    ran = job.run(2, "--num-blocks", 8)
    assert ran.returncode == 0, ran.stderr
    assert choices(job) == choices(alone)


def test_a_resumed_job_answers_the_same(alone, tmp_path, tiny_model):
    job = BatchJob(tmp_path, tiny_model, rows())
    assert job.run(0, "--max-num-seqs", 5).returncode == 0
    whole = job.output.read_bytes()
    job.output.write_bytes(whole[: len(whole) // 3])
    ran = job.run(0, "--max-num-seqs", 3)
    assert ran.returncode == 0, ran.stderr
    assert choices(job) == choices(alone)
