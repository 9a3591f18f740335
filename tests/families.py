"""A tiny random model of transformers for every family, and what it says: the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

VOCABULARY = 96


class Tiny(NamedTuple):
    """The classes of transformers, and the settings that make a small model of them."""

    family: str
    """Class of the model; that of the config ends in Config."""
    config: str
    settings: dict[str, Any]


LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {**LLAMA, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 24}
MOE = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


def llama(**changes: Any) -> Tiny:
    return Tiny("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **changes})


TINY: dict[str, Tiny] = {
    "llama-linear": llama(rope_parameters=LINEAR),
    "llama-llama3": llama(rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-yarn": llama(rope_parameters=YARN),
    "llama-dynamic": llama(rope_parameters=DYNAMIC, max_position_embeddings=64),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": None}),
    "mistral-window": Tiny("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 60}),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen2-window": Tiny("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, **SLIDING}),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 32}),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**LLAMA, **MOE}),
    "qwen3-moe-normalised": Tiny(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**LLAMA, **MOE, "norm_topk_prob": True}
    ),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", {**LLAMA, "pad_token_id": 0}),
    "phi3-partial": Tiny(
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **LLAMA,
            "pad_token_id": 0,
            "sliding_window": 60,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gemma2": Tiny(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": Tiny(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    ),
    "gpt2-scaled": Tiny(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "n_inner": 80,
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
    ),
    "bloom": Tiny(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 96, "n_layer": 3, "n_head": 6},
    ),
}


def save(name: str, path: Path, **changes: Any) -> Any:
    """Save the tiny model `name` to `path`; returns it. Eager attention: the only one of
    transformers that computes every option."""
    import transformers

    family, config, settings = TINY[name]
    made = getattr(transformers, config)(**{**settings, "initializer_range": 0.2, **changes})
    made._attn_implementation = "eager"
    torch.manual_seed(11)
    model = getattr(transformers, family)(made).eval()
    centre = 0.0 if "gemma" in name else 1.0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif parameter.dim() == 1:
                parameter.uniform_(centre - 0.5, centre + 0.5)
    model.save_pretrained(path)
    return model


def prompt(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()


def continuation(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens by greedy choice, whatever they are."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    answer: list[int] = done[0, len(tokens) :].tolist()
    return answer
