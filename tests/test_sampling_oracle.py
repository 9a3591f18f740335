"""Sampling fields on the real model, against what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_job import chat, completion
from local_ranks import open_local

from hpc_distkv import Engine, EngineOptions, Files

STORY = "The lighthouse stood on a"
QUESTION = "Write one sentence about the sea."
PENALTY = 1.3


@pytest.fixture(scope="module")
def answers(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bodies of the answers, by custom_id."""
    question = chat("least", QUESTION, 60)
    question["body"] |= {"min_tokens": 50, "logprobs": True, "top_logprobs": 5}
    stopping = chat("stop", QUESTION, 60)
    stopping["body"] |= {"stop": ["sea", " the s"]}
    rows = [
        completion("penalty", STORY, 40, repetition_penalty=PENALTY, logprobs=3),
        completion("echo", STORY, 8, echo=True),
        question,
        stopping,
        completion(
            "emoji", "Repeat: \U0001f9ff\u4f60\u597d. Repeat: \U0001f9ff\u4f60", 6, stop="\u597d"
        ),
    ]
    folder = tmp_path_factory.mktemp("oracle")
    files = Files(folder / "rows.jsonl", folder / "answers.jsonl")
    files.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EngineOptions(dtype="float32", num_blocks=64, block_size=16)
    Engine(demo_model, options, comm=open_local(1)[0]).run(files)
    lines = [json.loads(line) for line in files.output.read_bytes().splitlines()]
    assert [line for line in lines if line["error"]] == []
    return {line["custom_id"]: line["response"]["body"] for line in lines}


class Theirs:
    """Greedy answers of transformers."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def answer(self, prompt: list[int], tokens: int, **fields: Any) -> tuple[str, torch.Tensor]:
        """The text, and float64 log-probabilities `[tokens, vocab]` of the raw logits."""
        made = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **fields,
        )
        text = self.tokenizer.decode(made.sequences[0, len(prompt) :], skip_special_tokens=True)
        return text, torch.cat(made.logits).double().log_softmax(-1)

    def asked(self) -> list[int]:
        """The tokens of the question."""
        messages = [{"role": "user", "content": QUESTION}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


@pytest.fixture(scope="module")
def theirs(demo_model: Path) -> Theirs:
    return Theirs(demo_model)


def test_repetition_penalty_and_logprobs_of_a_completion(answers, theirs):
    text, scores = theirs.answer(
        theirs.tokenizer(STORY)["input_ids"], 40, repetition_penalty=PENALTY
    )
    [choice] = answers["penalty"]["choices"]
    assert choice["text"] == text
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == text
    best = scores.topk(3).values
    for place, top in enumerate(found["top_logprobs"]):
        expected = best[place].tolist()
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(expected, abs=1e-3)
        offset, name = found["text_offset"][place], found["tokens"][place]
        assert text[offset:].startswith(name)


def test_min_tokens_and_logprobs_of_a_chat(answers, theirs):
    text, scores = theirs.answer(theirs.asked(), 60, min_new_tokens=50)
    [choice] = answers["least"]["choices"]
    assert choice["message"]["content"] == text
    content = choice["logprobs"]["content"]
    assert 50 <= len(content) == answers["least"]["usage"]["completion_tokens"]
    spelled = bytes(byte for entry in content for byte in entry["bytes"]).decode()
    assert choice["finish_reason"] == "stop"
    assert spelled == text + "<|im_end|>", "the token that ends the answer has its logprob"
    best = scores.topk(5).values
    for place, entry in enumerate(content):
        found = [top["logprob"] for top in entry["top_logprobs"]]
        assert found == pytest.approx(best[place].tolist(), abs=1e-3)


def test_stop_strings_of_a_chat(answers, theirs):
    text, _ = theirs.answer(theirs.asked(), 60)
    ends = [place for place in (text.find("sea"), text.find(" the s")) if place >= 0]
    assert ends, f"no stop string in {text!r}"
    [choice] = answers["stop"]["choices"]
    assert choice["message"]["content"] == text[: min(ends)]
    assert choice["finish_reason"] == "stop"
    assert answers["stop"]["usage"]["completion_tokens"] < len(theirs.tokenizer(text)["input_ids"])


def test_echo(answers, theirs):
    text, _ = theirs.answer(theirs.tokenizer(STORY)["input_ids"], 8)
    assert answers["echo"]["choices"][0]["text"] == STORY + text


def test_a_character_of_several_tokens_is_a_stop_string(answers):
    [choice] = answers["emoji"]["choices"]
    assert "\u597d" not in choice["text"]
    assert "\ufffd" not in choice["text"] or choice["finish_reason"] == "length"
