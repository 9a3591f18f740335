"""The config.json files of published models, as far as they bear on the maths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_distkv.model.config import ModelConfig

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"windows": (4096,) * 32, "head_dim": 128, "widest_window": 4096},
    ),
    "Qwen2.5-7B-Instruct": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            "vocab_size": 152064,
        },
        {"windows": (), "qkv_bias": True, "out_bias": False, "rope.type": "yarn"},
    ),
    "Phi-3-mini-4k-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "vocab_size": 32064,
        },
        {"windows": (2047,) * 32, "head_dim": 96, "tie_embeddings": False},
    ),
    "gemma-2-9b-it": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
        {
            "windows": (4096, 0) * 21,
            "widest_window": 0,
            "tie_embeddings": True,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "activation": "gelu_tanh",
        },
    ),
    "gemma-3-1b-it": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        {
            "windows": ((512,) * 5 + (0,)) * 4 + (512, 512),
            "rope.theta": 1e6,
            "local_rope.theta": 1e4,
            "logit_softcap": 0.0,
            "tie_embeddings": True,
        },
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "layer_norm_epsilon": 1e-5,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        {"intermediate_size": 3072, "max_position": 1024, "head_dim": 64, "norm_eps": 1e-5},
    ),
    "bloom-560m": (
        {
            "apply_residual_connection_post_layernorm": False,
            "architectures": ["BloomForCausalLM"],
            "attention_softmax_in_fp32": True,
            "layer_norm_epsilon": 1e-5,
            "n_embed": 1024,
            "n_inner": None,
            "n_layer": 24,
            "num_attention_heads": 16,
            "pretraining_tp": 1,
            "seq_length": 2048,
            "vocab_size": 250880,
        },
        {"intermediate_size": 4096, "num_layers": 24, "max_position": 2048, "out_bias": True},
    ),
}


@pytest.mark.parametrize(("raw", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_is_read_as_meant(raw: dict, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    config = ModelConfig.from_dir(tmp_path)
    for name, value in expected.items():
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name
