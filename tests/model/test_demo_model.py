"""The demo model: written once, and it speaks English."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense import DenseAttention

from hpc_distkv.model.chat import ChatTemplate
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.tokenizer import Tokenizer
from hpc_distkv.model.weights import load_decoder

JOBS = Path(__file__).parent.parent.parent / "jobs"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / "demo_model.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_complete_model_is_left_alone(demo_model: Path) -> None:
    before = [(file.name, file.stat().st_mtime_ns) for file in sorted(demo_model.iterdir())]
    done = script(demo_model)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True)
    assert before == [(file.name, file.stat().st_mtime_ns) for file in sorted(demo_model.iterdir())]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = script(tmp_path)
    assert done.returncode == 1
    assert "remove it first" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_usage() -> None:
    assert script().returncode == 2
    assert script("--help").returncode == 0


def test_greedy_answer_equals_that_of_transformers(demo_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = ModelConfig.from_dir(demo_model)
    tokenizer = Tokenizer(demo_model)
    prompt = ChatTemplate(demo_model, tokenizer)(QUESTION)
    decoder = load_decoder(demo_model, config, "float32")
    attention, answer, piece = DenseAttention(decoder.attention), [], prompt
    with torch.inference_mode():
        while len(answer) < 20 and not set(config.eos_token_ids) & set(answer):
            start = len(prompt) + len(answer) - len(piece)
            positions = torch.arange(start, start + len(piece))
            hidden = decoder.hidden(torch.tensor(piece), positions, attention)
            piece = [int(decoder.logits(hidden[-1:]).argmax())]
            answer += piece
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    assert answer == theirs[0, len(prompt) :].tolist()
    assert "Paris" in tokenizer.decode(answer)


def test_sample_rows_fit_the_demo_model(demo_model: Path) -> None:
    config = ModelConfig.from_dir(demo_model)
    tokenizer = Tokenizer(demo_model)
    chat = ChatTemplate(demo_model, tokenizer)
    rows = [json.loads(line) for line in (JOBS / "prompts.jsonl").read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    lengths = {}
    for row in rows:
        body = row["body"]
        prompt = chat(body["messages"]) if "messages" in body else body["prompt"]
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        lengths[row["custom_id"]] = len(prompt) + body["max_tokens"]
    assert lengths["logbook-one-winter"] == pytest.approx(3000, rel=0.1)
    assert lengths["logbook-two-winters"] == pytest.approx(5500, rel=0.1)
    assert max(lengths.values()) <= config.max_position
