"""Every family against transformers: all logits of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import logits_of, reference_logits
from families import TINY, prompt, save
from safetensors.torch import load_file, save_file

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.weights import load_decoder

LENGTH = 90


def logits(path: Path, tokens: torch.Tensor, dtype: str = "float32") -> torch.Tensor:
    """As if all tokens were one prompt, whatever depends on its length."""
    decoder = load_decoder(path, ModelConfig.from_dir(path), dtype)
    if not decoder.needs_lengths:
        return logits_of(decoder, tokens, cuts=(37,))
    hidden = decoder.hidden

    def whole(ids, positions, attend):
        return hidden(ids, positions, attend, lengths=torch.full_like(ids, len(tokens)))

    decoder.hidden = whole
    return logits_of(decoder, tokens, cuts=(37,))


@pytest.mark.parametrize("name", TINY)
def test_float32_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    tokens = torch.tensor(prompt(LENGTH, 1))
    torch.testing.assert_close(
        logits(tmp_path, tokens), reference_logits(model, tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe", "bloom", "gpt2"])
def test_bfloat16_is_as_near_to_the_truth_as_transformers(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    tokens = torch.tensor(prompt(LENGTH, 1))
    truth = reference_logits(model, tokens)
    ours = (logits(tmp_path, tokens, "bfloat16") - truth).abs().mean()
    theirs = (reference_logits(model.bfloat16(), tokens) - truth).abs().mean()
    assert ours < 1.3 * theirs


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_checkpoints_of_the_bare_model_lack_the_prefix(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    file = tmp_path / "model.safetensors"
    stripped = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    if name == "gpt2":  # the buffers of old checkpoints
        stripped["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        stripped["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(stripped, file)
    tokens = torch.tensor(prompt(LENGTH, 1))
    torch.testing.assert_close(
        logits(tmp_path, tokens), reference_logits(model, tokens), rtol=0, atol=1e-4
    )


def rewrite(path: Path, **changes: Any) -> None:
    """Change config.json; a change to None removes the key."""
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def test_configs_of_earlier_transformers_give_the_same_gemma3(tmp_path: Path) -> None:
    save("gemma3", tmp_path, num_hidden_layers=3, sliding_window_pattern=2, layer_types=None)
    new = ModelConfig.from_dir(tmp_path)
    rewrite(
        tmp_path,
        rope_parameters=None,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=None,
        sliding_window_pattern=2,
    )
    old = ModelConfig.from_dir(tmp_path)
    assert (old.rope, old.local_rope, old.windows) == (new.rope, new.local_rope, new.windows)
    assert old.windows == (24, 0, 24)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation.*relu"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_embd": -1}, "n_embd"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "mscale": 1.0}}, "mscale"),
    ],
)
def test_names_the_key_it_does_not_support(
    name: str, changes: dict, named: str, tmp_path: Path
) -> None:
    save(name, tmp_path)
    rewrite(tmp_path, **changes)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=rf"config\.json: .*{named}"):
        ModelConfig.from_dir(tmp_path)
