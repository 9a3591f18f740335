"""What a model directory may say, and what it is told otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.files import GenerationDefaults
from hpc_distkv.model.rope import ROPE_TYPES

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}


def directory(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A model directory with empty weights; a change to None removes the key."""
    raw = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(raw))
    (path / "model.safetensors").write_bytes(b"never read")
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_reads_the_numbers_and_derives_the_rest(tmp_path: Path) -> None:
    config = ModelConfig.from_dir(directory(tmp_path))
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (16, 2, "bfloat16")
    assert config.kv_bytes_per_token("float32") == 2 * 3 * 2 * 16 * 4
    assert config.kv_bytes_per_token() == 2 * 3 * 2 * 16 * 2
    assert config.eos_token_ids == (1,)
    assert config.generation == GenerationDefaults(temperature=0.0)
    assert config.rope.theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None}, "architecture"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope.*yarn.*llama3"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "hidden_act.*relu.*silu"),
        ({"sliding_window": 64}, "sliding_window.*64.*not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype.*float8.*bfloat16"),
        ({"dtype": {"vision": "float32"}}, "json: dtype.*vision.*bfloat16"),
        ({"hidden_act": ["silu"]}, "hidden_act.*silu.*gelu"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_refuses_what_it_would_compute_wrongly(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dir(directory(tmp_path, **changes))


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_a_rope_section_without_what_its_type_needs_is_refused_where_transformers_does(
    kind: str, tmp_path: Path
) -> None:
    whole = {
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    if kind != "llama3":
        del whole["low_freq_factor"], whole["high_freq_factor"]
    if kind in ("default", "linear"):
        del whole["original_max_position_embeddings"]
    if kind == "default":
        del whole["factor"]
    refused = set()
    for left_out in (None, *whole):
        section = {"rope_type": kind} | {n: v for n, v in whole.items() if n != left_out}
        path = directory(tmp_path, rope_parameters=section)
        try:
            LlamaConfig.from_pretrained(path)
        except KeyError:
            refused.add(left_out)
            with pytest.raises(ModelError, match=f"rope_parameters.{left_out}"):
                ModelConfig.from_dir(path)
        else:
            ModelConfig.from_dir(path)
    needed = {"factor": kind != "default", "low_freq_factor": kind == "llama3"}
    assert {name for name, needs in needed.items() if needs} <= refused


def test_of_two_rope_sections_the_one_counts_that_transformers_takes(tmp_path: Path) -> None:
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    linear = {"rope_type": "linear", "factor": 2.0}
    path = directory(tmp_path, rope_scaling=linear, **both)
    theirs = LlamaConfig.from_pretrained(path).rope_parameters
    ours = ModelConfig.from_dir(path).rope
    assert (ours.type, ours.factor, ours.theta) == ("linear", 2.0, theirs["rope_theta"])
    with pytest.raises(ModelError, match=r"rope_scaling\.rope_type 'foo' is not supported"):
        ModelConfig.from_dir(directory(tmp_path, rope_scaling={"rope_type": "foo"}, **both))


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **more}}


ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({}, 4096),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        (yarn(), 16384),
        (yarn(**{ORIGINAL: 4096}), 16384),
        (yarn(**{ORIGINAL: 1024}, finetuned=True), 4096),
        ({"max_position_embeddings": 40960, **yarn(**{ORIGINAL: 32768})}, 131072),  # Qwen3
        ({"rope_scaling": {**LLAMA3, "factor": 8.0, ORIGINAL: 512}}, 4096),
    ],
)
def test_a_request_is_as_long_as_stretched_positions_reach(
    changes: dict, reach: int, tmp_path: Path
) -> None:
    """The lengths are those of vLLM's --max-model-len."""
    config = ModelConfig.from_dir(directory(tmp_path, **changes))
    assert config.longest() == config.longest(reach) == reach
    with pytest.raises(ModelError, match=f"is made for {reach} tokens"):
        config.longest(reach + 1)


def test_what_gemma_3_says_is_stretched_already(tmp_path: Path) -> None:
    gemma = {
        "architectures": ["Gemma3ForCausalLM"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert ModelConfig.from_dir(directory(tmp_path, **gemma)).longest() == 4096


def test_a_window_that_only_stretched_positions_outgrow_is_one(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert ModelConfig.from_dir(directory(tmp_path, **mistral)).windows == ()
    config = ModelConfig.from_dir(directory(tmp_path, **mistral, **yarn()))
    assert config.windows == (4096,) * 3


def test_generation_config_adds_stop_tokens_and_sampling(tmp_path: Path) -> None:
    generation = {"eos_token_id": [7, 1], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    config = ModelConfig.from_dir(directory(tmp_path, generation))
    assert config.eos_token_ids == (7, 1)
    assert config.generation == GenerationDefaults(temperature=0.6, top_p=0.9, top_k=50)


def test_all_sampling_settings_are_read(tmp_path: Path) -> None:
    generation = {"do_sample": True, "top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1}
    config = ModelConfig.from_dir(directory(tmp_path, generation))
    assert config.generation == GenerationDefaults(1.0, 1.0, 0, 0.05, 1.1)
    config = ModelConfig.from_dir(directory(tmp_path, {"repetition_penalty": 1.1, "min_p": 0.2}))
    assert config.generation == GenerationDefaults(repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "hot"), ("top_p", 0), ("min_p", True), ("repetition_penalty", -1)],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_sampling_settings_that_make_no_sense(
    tmp_path: Path, key: str, value: object, sampled: bool
) -> None:
    with pytest.raises(ModelError, match=f"generation_config.json: {key} must be a number"):
        ModelConfig.from_dir(directory(tmp_path, {"do_sample": sampled, key: value}))


def test_sampling_settings_without_do_sample_stay_greedy(tmp_path: Path) -> None:
    config = ModelConfig.from_dir(directory(tmp_path, {"temperature": 0.6, "do_sample": False}))
    assert config.generation.temperature == 0.0


def test_fingerprint_follows_config_and_weight_files(tmp_path: Path) -> None:
    first = ModelConfig.from_dir(directory(tmp_path)).fingerprint
    assert ModelConfig.from_dir(tmp_path).fingerprint == first
    (tmp_path / "model.safetensors").write_bytes(b"longer than before")
    second = ModelConfig.from_dir(tmp_path).fingerprint
    third = ModelConfig.from_dir(directory(tmp_path, rms_norm_eps=1e-4)).fingerprint
    assert len({first, second, third}) == 3


def test_bad_directories_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="local model directory"):
        ModelConfig.from_dir(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelConfig.from_dir(tmp_path)
    directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights are missing"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="save_pretrained"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(ModelError, match=r"b\.safetensors is missing"):
        ModelConfig.from_dir(tmp_path)


def test_config_tokenizer_and_chat_start_without_torch() -> None:
    code = (
        "import sys, hpc_distkv.model.config, hpc_distkv.model.chat\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
