"""What a model directory says about its model. No torch here, so that checking one is instant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.family import COMMON_REQUIRED, FAMILIES, Family
from hpc_distkv.model.files import (
    GenerationDefaults,
    fingerprint,
    read_config,
    read_optional_json,
    weight_files,
)
from hpc_distkv.model.rope import Rope
from hpc_distkv.model.settings import MOST_WHOLE, Settings, read_windows

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST_LAYERS = 4096
MOST_EXPERTS = 1 << 18
"""Of all layers."""
MOST_HEADS = 1 << 14
MOST_WIDE = 1 << 24
"""No model is larger than these, of heads in number and width, and of hidden size, vocabulary and
MLP: what says so is damaged."""
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""hidden_act → our name of the function."""


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a decoder, and the defaults its checkpoint ships with."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of the MLP, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    """Tokens that the model is made for, its positions stretched as config.json says."""
    norm_eps: float = 1e-6
    activation: str = "silu"
    """One of the values of `ACTIVATIONS`."""
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None
    """Of layers with a window, if it is another."""
    windows: tuple[int, ...] = ()
    """For each layer the tokens that a query sees, its own included, or 0: all; empty: all 0."""
    query_scalar: float | None = None
    """Scores are divided by its root; None: head_dim."""
    scale_by_layer: bool = False
    """Scores of layer i are also divided by i + 1."""
    attention_softcap: float = 0.0
    """Bound of scores; 0: none. So is the next, of logits."""
    logit_softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    """Per layer; 0: the MLP is one for all tokens."""
    experts_per_token: int = 0
    normalise_experts: bool = False
    """The weights of a token's experts sum to 1."""
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    """The checkpoint's: "float32", "bfloat16" or "float16"."""
    eos_token_ids: tuple[int, ...] = ()
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    fingerprint: str = ""
    """Hash of config.json and of the names and sizes of the weight files."""

    @classmethod
    def from_dir(cls, path: str | Path, weightless: bool = False) -> ModelConfig:
        """Read a model directory in the Hugging Face layout; `weightless`: one that need not have
        any weights.

        Raises ModelError, before any weight is read, for a directory that is none, and for an
        architecture or a setting that this decoder would compute wrongly.
        """
        folder = Path(path)
        if not os.path.isdir(folder):
            raise ModelError(
                f"{folder} is no directory: --model takes a local model directory "
                "(config.json, *.safetensors, tokenizer.json)"
            )
        raw = read_config(folder)
        weights = [] if weightless else weight_files(folder)
        generation = read_optional_json(folder / "generation_config.json")
        return _parse(raw, generation, str(folder / "config.json"), fingerprint(raw, weights))

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of K and V of one token in all layers, in `dtype` (the checkpoint's if None)."""
        return (
            2
            * self.num_layers
            * self.num_kv_heads
            * self.head_dim
            * dtype_bytes(dtype or self.dtype)
        )

    def longest(self, asked: int | None = None) -> int:
        """Tokens that a request may have at most: those `asked` for, or as many as the model is
        made for. Raises ModelError for more than its positions reach."""
        if asked is not None and asked > self.max_position:
            raise ModelError(
                f"--max-model-len {asked}: by its config.json the model is made for "
                f"{self.max_position} tokens"
            )
        return asked or self.max_position

    @property
    def widest_window(self) -> int:
        """Tokens that a query sees in the layers that see most; 0: all."""
        return max(self.windows) if self.windows and all(self.windows) else 0

    @property
    def attention_tokens(self) -> float:
        """Context length at which a token's attention costs as much as its linear layers."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        layers = self.num_layers * self._layer_weights(self.experts_per_token)
        active = layers + embeddings + self.hidden_size
        return active / (2 * self.num_layers * self.num_heads * self.head_dim)

    def shard(self, lanes: int) -> ModelConfig:
        """What is left of the model for one of `lanes` that hold it together: fewer heads and a
        narrower MLP. Raises ModelError, naming the numbers that work, if it cannot be cut so."""
        numbers = [number for number in range(1, self.num_heads + 1) if self.divides(number)]
        if lanes not in numbers:
            raise ModelError(
                f"--tensor-parallel-size {lanes} does not divide a model of {self.num_heads} query "
                f"heads, {self.num_kv_heads} KV heads and intermediate size "
                f"{self.intermediate_size}; sizes that do: {', '.join(map(str, numbers))}"
            )
        return replace(
            self,
            num_heads=self.num_heads // lanes,
            num_kv_heads=max(1, self.num_kv_heads // lanes),
            intermediate_size=self.intermediate_size // lanes,
        )

    def divides(self, lanes: int) -> bool:
        """Whether heads and MLP can be cut into `lanes` equal shares."""
        return (
            self.num_heads % lanes == 0
            and self.intermediate_size % lanes == 0
            and (self.num_kv_heads % lanes == 0 or lanes % self.num_kv_heads == 0)
        )

    def num_weights(self, lanes: int = 1, packed: bool = False) -> int:
        """Number of weights, biases left out, of this model, or of this shard of one whose
        vocabulary is cut into `lanes` parts; `packed`: a tied head has a copy of its own, as on
        CPUs."""
        rows = -(-self.vocab_size // lanes) * (1 if self.tie_embeddings and not packed else 2)
        if self.family.positions == "learned":
            rows += self.max_position
        layers = self.num_layers * self._layer_weights(self.num_experts)
        return layers + (rows + 1) * self.hidden_size

    def _layer_weights(self, experts: int) -> int:
        """Number of weights of a layer with so many experts, biases left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = (3 if self.family.gated else 2) * self.hidden_size * self.intermediate_size
        if self.num_experts:
            mlp = experts * mlp + self.num_experts * self.hidden_size
        return attention + mlp + 2 * self.hidden_size


def dtype_name(dtype: object) -> str:
    """ "float32" of that name or of torch's dtype."""
    return str(dtype).removeprefix("torch.")


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value of the dtype named `dtype`; ModelError for a dtype not supported."""
    if dtype not in DTYPE_BYTES:
        raise ModelError(
            f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPE_BYTES)}"
        )
    return DTYPE_BYTES[dtype]


def _parse(
    raw: Mapping[str, Any], generation: Mapping[str, Any], where: str, fingerprint: str
) -> ModelConfig:
    family = _family(raw, where)
    aliases = {"norm_eps": "rms_norm_eps", **family.aliases}
    read = Settings(raw, where, family.defaults, aliases)
    for key, allowed in {**COMMON_REQUIRED, **family.required}.items():
        read.require(key, allowed)
    layers = read.whole("num_hidden_layers", most=MOST_LAYERS)
    hidden = read.whole("hidden_size", most=MOST_WIDE)
    heads, kv_heads, head_dim = _heads(read, hidden)
    rope, local_rope = _ropes(read, family, head_dim)
    max_position = _max_position(read, rope, local_rope)
    experts = read.whole("num_experts", most=MOST_EXPERTS // layers) if family.experts else 0
    return ModelConfig(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(read, family, hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=read.whole("vocab_size", most=MOST_WIDE),
        max_position=max_position,
        norm_eps=read.positive("norm_eps", 1e-6),
        activation=ACTIVATIONS[read.choice("hidden_act", ACTIVATIONS, "silu")],
        rope=rope,
        local_rope=local_rope,
        windows=read_windows(read, family, layers, max_position),
        query_scalar=_query_scalar(read),
        scale_by_layer=read.flag("scale_attn_by_inverse_layer_idx"),
        attention_softcap=read.optional("attn_logit_softcapping") or 0.0,
        logit_softcap=read.optional("final_logit_softcapping") or 0.0,
        qkv_bias="qkv" in family.biases or read.flag("attention_bias"),
        out_bias="out" in family.biases or read.flag("attention_bias"),
        mlp_bias="mlp" in family.biases or read.flag("mlp_bias"),
        num_experts=experts,
        experts_per_token=_experts_per_token(read, experts) if experts else 0,
        normalise_experts=read.flag("norm_topk_prob"),
        tie_embeddings=read.flag("tie_word_embeddings"),
        dtype=read.choice("dtype" if raw.get("dtype") else "torch_dtype", DTYPE_BYTES, "float32"),
        eos_token_ids=_eos_token_ids(where, generation, raw),
        generation=GenerationDefaults.read(generation),
        fingerprint=fingerprint,
    )


def _family(raw: Mapping[str, Any], where: str) -> Family:
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    family = FAMILIES.get(str(name))
    if family is None:
        raise ModelError(
            f"{where}: architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return family


def _heads(read: Settings, hidden: int) -> tuple[int, int, int]:
    """Query heads, KV heads, and their dimension."""
    heads = read.whole("num_attention_heads", most=MOST_HEADS)
    kv_heads = read.whole("num_key_value_heads", heads, most=MOST_HEADS)
    if heads % kv_heads:
        few = read.name("num_key_value_heads")
        raise read.error("num_attention_heads", f"{heads} is no multiple of {few} {kv_heads}")
    head_dim = None if hidden % heads else hidden // heads
    return heads, kv_heads, read.whole("head_dim", head_dim, most=MOST_HEADS)


def _ropes(read: Settings, family: Family, head_dim: int) -> tuple[Rope, Rope | None]:
    if family.positions != "rope":
        return Rope(), None
    if head_dim % 2:
        raise read.error("head_dim", f"must be even for rotary embedding, not {head_dim}")
    return Rope.of_layers(read, family.local_rope, family.partial_rotary)


def _max_position(read: Settings, rope: Rope, local_rope: Rope | None) -> int:
    """As vLLM counts it: Gemma 3 states the stretched length."""
    stated = read.whole("max_position_embeddings")
    reach = stated if local_rope else rope.reach(stated)
    if reach > MOST_WHOLE:
        raise read.error("max_position_embeddings", f"is stretched to {reach} tokens")
    return reach


def _intermediate_size(read: Settings, family: Family, hidden: int) -> int:
    if family.experts:
        return read.whole("moe_intermediate_size", most=MOST_WIDE)
    wide = None if family.gated else 4 * hidden
    return read.whole("intermediate_size", wide, most=4 * MOST_WIDE)


def _query_scalar(read: Settings) -> float | None:
    if not read.flag("scale_attn_weights", True):
        return 1.0
    return read.optional("query_pre_attn_scalar")


def _experts_per_token(read: Settings, experts: int) -> int:
    chosen = read.whole("num_experts_per_tok")
    if chosen > experts:
        raise read.error("num_experts_per_tok", f"must be at most num_experts {experts}")
    return chosen


def _eos_token_ids(where: str, *sources: Mapping[str, Any]) -> tuple[int, ...]:
    """Those of all `sources`, each a number or a list, without repeats."""
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if item is None or item in ids:
                continue
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise ModelError(f"{where}: eos_token_id must be token ids, not {value!r}")
            ids.append(item)
    return tuple(ids)
