"""Model shapes against published numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_distkv.errors import OptionError
from hpc_distkv.model.errors import ModelError
from hpc_distkv.simulate.models import MODELS, ModelShape


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama2-7b", 6.738e9),
        ("llama2-13b", 13.016e9),
        ("llama2-70b", 68.977e9),
        ("llama3-70b", 70.554e9),
        ("smollm2-135m", 134.5e6),
    ],
)
def test_parameters_and_weight_bytes_are_those_of_the_published_model(
    name: str, published: float
) -> None:
    model = MODELS[name]
    assert model.parameters == pytest.approx(published, rel=0.02)  # the embedding table is left out
    assert model.weight_bytes == pytest.approx(2 * published, rel=0.001)


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("llama2-7b", 512 * 1024),
        ("llama2-13b", 800 * 1024),
        ("llama2-70b", 320 * 1024),
        ("llama3-70b", 320 * 1024),
        ("smollm2-135m", 23_040),
    ],
)
def test_kv_bytes_of_a_token_are_the_published_ones(name: str, kv_bytes: int) -> None:
    assert MODELS[name].kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("name", "megabytes", "kv_tokens"),
    [("llama2-7b", 0.53, 1), ("llama2-13b", 0.83, 1), ("llama2-70b", 2.66, 8)],
)
def test_a_query_costs_what_the_paper_says_on_the_wire(
    name: str, megabytes: float, kv_tokens: int
) -> None:
    model = MODELS[name]
    assert round(model.wire_bytes / 1e6, 2) == megabytes
    assert round(model.wire_bytes / model.kv_bytes_per_token) == kv_tokens


def test_attention_outweighs_linear_layers_from_attention_tokens_on() -> None:
    """llama2-7b: 2 · 6.607e9 FLOPs linear, 4 · 32 · 4096 per token of context."""
    assert MODELS["llama2-7b"].attention_tokens == pytest.approx(
        2 * 6.607e9 / (4 * 32 * 4096), rel=1e-3
    )


def test_an_mlp_without_gate_has_two_matrices() -> None:
    gated = ModelShape("a", 1, 8, 32, 2, 2, 4, 100)
    plain = ModelShape("a", 1, 8, 32, 2, 2, 4, 100, gated=False)
    assert gated.parameters - plain.parameters == 8 * 32


def test_kv_heads_are_shared_out_and_then_copied() -> None:
    assert [MODELS["llama2-70b"].kv_share(tp) for tp in (1, 4, 8, 32)] == [1, 1 / 4, 1 / 8, 1 / 8]


@pytest.mark.parametrize(
    ("name", "tp"), [("llama2-13b", 32), ("smollm2-135m", 2), ("llama2-7b", 0)]
)
def test_heads_that_do_not_divide_are_refused(name: str, tp: int) -> None:
    with pytest.raises(OptionError, match=f"size {tp} does not divide .* {name}"):
        MODELS[name].kv_share(tp)


def test_a_model_directory_has_the_shape_of_its_config(tmp_path: Path) -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    shape = ModelShape.named(tmp_path)
    assert shape.name == tmp_path.name
    assert shape.parameters == MODELS["smollm2-135m"].parameters
    assert shape.kv_bytes_per_token == 2 * MODELS["smollm2-135m"].kv_bytes_per_token


def test_unknown_names_are_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"llama-9b is neither.*llama2-7b, llama2-13b"):
        ModelShape.named("llama-9b")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ModelShape.named(tmp_path)


def test_shapes_and_costs_start_without_torch() -> None:
    code = "import sys, hpc_distkv.simulate.cost; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mixture_of_experts_meets_few_weights_and_keeps_all(tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 30.5e9 parameters, of which a token meets 3.3e9."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    model = ModelShape.named(tmp_path)
    assert model.weight_bytes == pytest.approx(2 * 30.5e9, rel=0.01)
    assert model.parameters == pytest.approx(3.3e9 - 0.3e9, rel=0.03)  # without the table
