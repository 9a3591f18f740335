"""Models for all tests, and a folder that is importable (`from mpirun import run_mpi`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpc_distkv.decide.pace import Pace, StepSeconds, StepWork

if TYPE_CHECKING:
    from hpc_distkv.model.decoder import Decoder

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before torch is imported: tests run beside each other, and threads that spin take each other's
cores."""

REPOSITORY = Path(__file__).parent.parent

TINY_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers (4 heads, 2 KV heads, head_dim 16) with random weights and a tokenizer.

    Read only: it is kept in pytest's cache from run to run.
    """
    kept = Path(request.config.cache.mkdir("tiny-llama-1")) / "model"
    if not kept.exists():
        made = tmp_path_factory.mktemp("tiny") / "model"
        write_tiny_weights(made)
        write_tiny_tokenizer(made)
        scratch = Path(shutil.copytree(made, kept.parent / f"being-made-{made.parent.name}"))
        try:
            scratch.rename(kept)
        except OSError:  # another test run was faster
            shutil.rmtree(scratch)
    return kept


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Of random weights, for whole clusters."""
    from clusters import tiny_decoder

    return tiny_decoder()


@pytest.fixture(scope="module")
def whole(tiny_model: Path) -> Decoder:
    """`tiny_model` on one rank."""
    from hpc_distkv.model.config import ModelConfig
    from hpc_distkv.model.weights import load_decoder

    return load_decoder(tiny_model, ModelConfig.from_dir(tiny_model))


@pytest.fixture(scope="module")
def windowed_model() -> Decoder:
    """A model with a window in every layer."""
    from families import VOCABULARY

    from hpc_distkv.model.config import ModelConfig
    from hpc_distkv.model.family import FAMILIES
    from hpc_distkv.model.weights import random_decoder

    config = ModelConfig(
        family=FAMILIES["MistralForCausalLM"],
        num_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position=4096,
        windows=(70, 50),
    )
    return random_decoder(config, "float32")


@pytest.fixture
def steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is taken to last as long as its work says, so that with a seeded schedule a whole
    run depends on its seed alone."""
    note = Pace.note

    def by_work(self: Pace, work: StepWork, seconds: StepSeconds) -> None:
        total = 1e-2 + 1e-3 * work.decodes + 1e-6 * work.kv_tokens + 1e-3 * work.prompt_work
        note(self, work, StepSeconds(total, 1e-3 * work.exchanging, 0.0))

    monkeypatch.setattr(Pace, "note", by_work)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, written by jobs/demo_model.py the first time."""
    path = REPOSITORY / ".demo" / "SmolLM2-135M-Instruct"
    command = [sys.executable, str(REPOSITORY / "jobs" / "demo_model.py"), str(path)]
    if not (path / "model.safetensors").exists():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no demo model: {done.stderr[-300:]}")
    return path


def write_tiny_weights(path: Path) -> None:
    """Weights large enough that greedy texts wander instead of repeating one token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.35,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def write_tiny_tokenizer(path: Path) -> None:
    """A byte-level BPE of 300 tokens, trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([__file__], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TINY_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
