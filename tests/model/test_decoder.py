"""The decoder against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense import logits_of, reference_logits, save_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_distkv.attention import Rotation
from hpc_distkv.attention.reference import rotate
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.rope import Rope
from hpc_distkv.model.weights import load_decoder, random_decoder

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS = {
    "grouped": {},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3_rope": {"rope_parameters": LLAMA3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_float32_logits_equal_those_of_transformers(tmp_path: Path, changes: dict) -> None:
    model = save_llama(tmp_path, **changes)
    decoder = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), "float32")
    tokens = torch.randint(0, 101, (300,))
    torch.testing.assert_close(
        logits_of(decoder, tokens), reference_logits(model, tokens), rtol=0, atol=1e-4
    )


def test_config_of_earlier_transformers_gives_the_same_model(tmp_path: Path) -> None:
    save_llama(tmp_path, rope_parameters=LLAMA3)
    new = ModelConfig.from_dir(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    raw["rope_scaling"] = scaling
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw))
    old = ModelConfig.from_dir(tmp_path)
    assert old.rope == new.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 64)
    assert old.dtype == new.dtype


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.sets(st.integers(1, 39)))
def test_feeding_in_pieces_equals_feeding_at_once(tiny_model: Path, cuts: set[int]) -> None:
    decoder = load_decoder(tiny_model, ModelConfig.from_dir(tiny_model), "float32")
    tokens = torch.arange(40) * 7 % 300
    torch.testing.assert_close(
        logits_of(decoder, tokens, tuple(sorted(cuts))),
        logits_of(decoder, tokens),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_the_truth_as_transformers(tmp_path: Path, dtype: str) -> None:
    model = save_llama(tmp_path)
    tokens = torch.randint(0, 101, (64,))
    truth = reference_logits(model, tokens)
    decoder = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), dtype)
    ours = (logits_of(decoder, tokens) - truth).abs().mean()
    theirs = (reference_logits(model.to(decoder.dtype), tokens) - truth).abs().mean()
    assert ours < 1.3 * theirs


def test_layers_driven_one_at_a_time_equal_hidden(tiny_model: Path) -> None:
    decoder = load_decoder(tiny_model, ModelConfig.from_dir(tiny_model))
    tokens, positions = torch.arange(9), torch.arange(9)

    def attend(layer: int, qk: torch.Tensor, v: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        return rotate(qk, rotation)[:, : -v.shape[1]] * (layer + 1)

    with torch.inference_mode():
        x, rotations = decoder.embed(tokens, positions), decoder.rotations(positions)
        for index in range(len(decoder.layers)):
            x = decoder.layer(index, x, rotations, attend)
        assert torch.equal(x, decoder.hidden(tokens, positions, attend))
        assert decoder.logits(x[:0]).shape == (0, 320)


def test_a_step_changes_neither_weights_nor_inputs(tiny_model: Path) -> None:
    decoder = load_decoder(tiny_model, ModelConfig.from_dir(tiny_model))
    tokens = torch.arange(9)
    assert torch.equal(logits_of(decoder, tokens), logits_of(decoder, tokens))


def test_random_decoder_depends_on_its_seed_alone(tiny_model: Path) -> None:
    config = ModelConfig.from_dir(tiny_model)
    tokens = torch.arange(20)
    one, same, other = (logits_of(random_decoder(config, seed=s), tokens) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.isfinite().all()
    assert len(set(one.argmax(-1).tolist())) > 5


def test_tiny_model_says_diverse_things(tiny_model: Path) -> None:
    config = ModelConfig.from_dir(tiny_model)
    logits = logits_of(load_decoder(tiny_model, config), torch.arange(60))
    assert len(set(logits.argmax(-1).tolist())) > 25
