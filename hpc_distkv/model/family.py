"""The model families that the decoder can be configured for: one row of `FAMILIES` each.

To add a family:

1. Add its row: the names of its tensors (`names`), what its config.json calls keys (`aliases`) and
   what missing keys mean (`defaults`), and the values that are supported of keys which change the
   maths (`required`); then what it computes otherwise than Llama (`norm`, `positions`, ...).
2. If it computes something that no field of `Family` says, add a field. `config.py` reads what
   config.json says of it, `build.py` allocates the weights, `slots.py` says which tensor goes
   where, and `decoder.py` computes it.
3. Add it to tests/families.py: its logits are compared with those of transformers.

The way from a directory to a decoder: `ModelConfig.from_dir` → `build.empty_decoder` →
`slots.slots` → `weights.load_decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Names = Mapping[str, str]
"""Slot of the decoder (`slots.py`) → name of the tensor in a checkpoint, without prefix and ending;
{layer} and {expert} stand for numbers. A checkpoint that keeps parts fused has the fused slot
("qkv", "gate_up"), another one the parts."""


@dataclass(frozen=True)
class Family:
    """One row: the settings of a family, and its names for tensors and for keys of config.json."""

    architecture: str
    names: Names = field(repr=False, hash=False)
    prefix: str = "model."
    """Before every name but the head's; checkpoints of the bare model leave it out."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False, hash=False)
    """Keys of config.json that change the maths → the values that are supported. A key may be
    missing."""
    defaults: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """Values of missing keys, where they differ from those of most families."""
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    """Name of a key in Llama's config.json → the family's name for it."""
    positions: Literal["rope", "learned", "alibi"] = "rope"
    local_rope: bool = False
    """Layers with a window have another rope than those without."""
    partial_rotary: bool = False
    """Rope may turn only a part of each head."""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    """Added to the stored weights of norms."""
    qk_norm: bool = False
    """Queries and keys are normed, head by head."""
    post_norms: bool = False
    """The results of attention and MLP are normed before they are added."""
    embedding_norm: bool = False
    scaled_embedding: bool = False
    """Embeddings are multiplied by √hidden."""
    biases: frozenset[str] = frozenset()
    """Linear layers ("qkv", "out", "mlp") that have a bias whatever config.json says."""
    gated: bool = True
    """The MLP is down(act(gate(x)) · up(x)), else down(act(up(x)))."""
    experts: bool = False
    """The MLP is a mixture of experts."""
    transposed: bool = False
    """Linear weights are stored [in, out]."""
    interleaved: bool = False
    """Rows of the fused QKV are stored head by head: [heads, 3, head_dim]."""
    windows: Literal["none", "all", "upper", "pattern"] = "none"
    """Layers with a window unless layer_types lists them: all, those from max_window_layers on, or
    all but every `sliding_window_pattern`-th."""


COMMON_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "use_bidirectional_attention": (None, False),
    "add_cross_attention": (None, False),
    "dual_chunk_attention_config": (None,),
}
"""As `Family.required`, for all families."""

_NO_WINDOWS: Mapping[str, tuple[Any, ...]] = {"sliding_window": (None,), "layer_types": (None,)}
_NO_TYPES: Mapping[str, tuple[Any, ...]] = {"layer_types": (None,)}

_ATTENTION: Names = {
    "q": "layers.{layer}.self_attn.q_proj",
    "k": "layers.{layer}.self_attn.k_proj",
    "v": "layers.{layer}.self_attn.v_proj",
    "out": "layers.{layer}.self_attn.o_proj",
}
_MLP: Names = {
    "gate": "layers.{layer}.mlp.gate_proj",
    "up": "layers.{layer}.mlp.up_proj",
    "down": "layers.{layer}.mlp.down_proj",
}
_OUTSIDE: Names = {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"}
_NORMS: Names = {
    "attention_norm": "layers.{layer}.input_layernorm",
    "mlp_norm": "layers.{layer}.post_attention_layernorm",
}
_QK_NORMS: Names = {
    "q_norm": "layers.{layer}.self_attn.q_norm",
    "k_norm": "layers.{layer}.self_attn.k_norm",
}
_LLAMA: Names = {**_OUTSIDE, **_NORMS, **_ATTENTION, **_MLP}
_GEMMA: Names = {
    **_LLAMA,
    "attention_post_norm": "layers.{layer}.post_attention_layernorm",
    "mlp_norm": "layers.{layer}.pre_feedforward_layernorm",
    "mlp_post_norm": "layers.{layer}.post_feedforward_layernorm",
}
_PHI3: Names = {
    **_OUTSIDE,
    **_NORMS,
    "qkv": "layers.{layer}.self_attn.qkv_proj",
    "out": "layers.{layer}.self_attn.o_proj",
    "gate_up": "layers.{layer}.mlp.gate_up_proj",
    "down": "layers.{layer}.mlp.down_proj",
}
_QWEN3_MOE: Names = {
    **_OUTSIDE,
    **_NORMS,
    **_ATTENTION,
    **_QK_NORMS,
    "router": "layers.{layer}.mlp.gate",
    "gate": "layers.{layer}.mlp.experts.{expert}.gate_proj",
    "up": "layers.{layer}.mlp.experts.{expert}.up_proj",
    "down": "layers.{layer}.mlp.experts.{expert}.down_proj",
}
_GPT2: Names = {
    "embedding": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "head": "lm_head",
    "attention_norm": "h.{layer}.ln_1",
    "qkv": "h.{layer}.attn.c_attn",
    "out": "h.{layer}.attn.c_proj",
    "mlp_norm": "h.{layer}.ln_2",
    "up": "h.{layer}.mlp.c_fc",
    "down": "h.{layer}.mlp.c_proj",
}
_BLOOM: Names = {
    "embedding": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "norm": "ln_f",
    "head": "lm_head",
    "attention_norm": "h.{layer}.input_layernorm",
    "qkv": "h.{layer}.self_attention.query_key_value",
    "out": "h.{layer}.self_attention.dense",
    "mlp_norm": "h.{layer}.post_attention_layernorm",
    "up": "h.{layer}.mlp.dense_h_to_4h",
    "down": "h.{layer}.mlp.dense_4h_to_h",
}

_QWEN_WINDOWS: Mapping[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_PLAIN_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "gelu_new",
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", _LLAMA, required=_NO_WINDOWS),
        Family(
            "MistralForCausalLM",
            _LLAMA,
            required={**_NO_TYPES, "attention_bias": (None, False), "mlp_bias": (None, False)},
            defaults={"sliding_window": 4096},
            windows="all",
        ),
        Family(
            "Qwen2ForCausalLM",
            _LLAMA,
            required={"attention_bias": (None, False), "mlp_bias": (None, False)},
            defaults=_QWEN_WINDOWS,
            biases=frozenset({"qkv"}),
            windows="upper",
        ),
        Family(
            "Qwen3ForCausalLM",
            {**_LLAMA, **_QK_NORMS},
            required={"mlp_bias": (None, False)},
            defaults={**_QWEN_WINDOWS, "head_dim": 128},
            qk_norm=True,
            windows="upper",
        ),
        Family(
            "Qwen3MoeForCausalLM",
            _QWEN3_MOE,
            required={
                **_NO_TYPES,
                "mlp_bias": (None, False),
                "mlp_only_layers": (None, []),
                "decoder_sparse_step": (1,),
            },
            defaults={
                "use_sliding_window": False,
                "sliding_window": 4096,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            },
            aliases={"num_experts": "num_local_experts"},
            qk_norm=True,
            experts=True,
            windows="all",
        ),
        Family(
            "Phi3ForCausalLM",
            _PHI3,
            required={**_NO_TYPES, "attention_bias": (None, False), "mlp_bias": (None, False)},
            defaults={"norm_eps": 1e-5},
            partial_rotary=True,
            windows="all",
        ),
        Family(
            "Gemma2ForCausalLM",
            _GEMMA,
            required={"mlp_bias": (None, False)},
            defaults={
                **_GEMMA_DEFAULTS,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window_pattern": 2,
            },
            aliases={"hidden_act": "hidden_activation"},
            norm_offset=1.0,
            post_norms=True,
            scaled_embedding=True,
            windows="pattern",
        ),
        Family(
            "Gemma3ForCausalLM",
            {**_GEMMA, **_QK_NORMS},
            required={"mlp_bias": (None, False), "attn_logit_softcapping": (None,)},
            defaults={**_GEMMA_DEFAULTS, "sliding_window_pattern": 6},
            aliases={"hidden_act": "hidden_activation"},
            local_rope=True,
            norm_offset=1.0,
            qk_norm=True,
            post_norms=True,
            scaled_embedding=True,
            windows="pattern",
        ),
        Family(
            "GPT2LMHeadModel",
            _GPT2,
            prefix="transformer.",
            required=_NO_WINDOWS,
            defaults=_PLAIN_DEFAULTS,
            aliases={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
                "intermediate_size": "n_inner",
                "hidden_act": "activation_function",
                "norm_eps": "layer_norm_epsilon",
            },
            positions="learned",
            norm="layer",
            biases=frozenset({"qkv", "out", "mlp"}),
            gated=False,
            transposed=True,
        ),
        Family(
            "BloomForCausalLM",
            _BLOOM,
            prefix="transformer.",
            required={
                **_NO_WINDOWS,
                "apply_residual_connection_post_layernorm": (None, False),
            },
            defaults={**_PLAIN_DEFAULTS, "max_position_embeddings": 2048},
            aliases={
                "hidden_size": "n_embed",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "seq_length",
                "norm_eps": "layer_norm_epsilon",
            },
            positions="alibi",
            norm="layer",
            embedding_norm=True,
            biases=frozenset({"qkv", "out", "mlp"}),
            gated=False,
            interleaved=True,
        ),
    )
}
