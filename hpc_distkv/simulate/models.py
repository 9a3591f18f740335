"""The shapes of models, as far as time and memory depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpc_distkv.errors import OptionError
from hpc_distkv.model.config import ModelConfig, dtype_bytes

STATISTICS_BYTES = 8
"""Of a partial result, per query and head: maximum and sum of exponentials, float32 each."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder. Norms, biases and the look-up of embeddings cost nothing here."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes_per_value: int = 2
    gated: bool = True
    """The MLP has three matrices, not two."""
    tied: bool = False
    """The head is the embedding table."""
    unmet: int = 0
    """Weights of experts that a token does not meet; `intermediate` is of those it meets."""

    @classmethod
    def named(cls, name_or_dir: str | Path) -> ModelShape:
        """A shape of `MODELS`, or that of a model directory.

        Raises OptionError for a name that is neither, ModelError for a directory that is no model.
        """
        if (known := MODELS.get(str(name_or_dir))) is not None:
            return known
        folder = Path(name_or_dir)
        if not folder.exists():
            raise OptionError(
                f"{name_or_dir} is neither a model directory nor one of {', '.join(MODELS)}"
            )
        return cls.of(ModelConfig.from_dir(folder), folder.resolve().name)

    @classmethod
    def of(cls, config: ModelConfig, name: str = "model") -> ModelShape:
        """The shape of a model directory's configuration."""
        return cls(
            name=name,
            layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size * max(1, config.experts_per_token),
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            bytes_per_value=dtype_bytes(config.dtype),
            gated=config.family.gated,
            tied=config.tie_embeddings,
            unmet=3
            * config.num_layers
            * (config.num_experts - config.experts_per_token)
            * config.hidden_size
            * config.intermediate_size,
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def head_parameters(self) -> int:
        """Weights of the layer that makes logits, and of the embedding table alike."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Weights a token meets in linear layers, head included: 2 FLOPs each."""
        return self.layer_parameters + self.head_parameters

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory: an embedding table that is not the head included, and
        all experts."""
        table = 0 if self.tied else self.head_parameters
        return (self.parameters + self.unmet + table) * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value

    def block_bytes(self, tp: int, block_size: int) -> float:
        """Bytes of an rBlock of `block_size` tokens on each of `tp` ranks. Raises OptionError if
        the heads do not divide among the ranks."""
        return self.kv_bytes_per_token * self.kv_share(tp) * block_size

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query token with one KV token in all layers: 2 for Q·K, 2 for P·V."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def attention_tokens(self) -> float:
        """Context length at which a token's attention has the FLOPs of its linear layers."""
        return 2 * self.parameters / self.pair_flops

    @property
    def wire_bytes(self) -> int:
        """Bytes of one query token's round trip to one creditor in all layers: Q out, MA and two
        statistics a head back, values in the model's dtype (DistAttention, arXiv 2401.02669).

        A runtime that returns its outputs in float32 with one statistic sends 1.5 times as much.
        """
        per_head = 2 * self.head_dim * self.bytes_per_value + STATISTICS_BYTES
        return self.layers * self.heads * per_head

    def kv_share(self, tp: int) -> float:
        """Share of the KV cache that each of `tp` ranks holds. With more ranks than KV heads every
        rank holds one head. Raises OptionError if the heads do not divide among the ranks."""
        if tp < 1 or self.heads % tp or (self.kv_heads % tp and tp % self.kv_heads):
            raise OptionError(
                f"tensor parallel size {tp} does not divide the {self.heads} query heads and "
                f"{self.kv_heads} KV heads of {self.name}"
            )
        return 1 / min(tp, self.kv_heads)


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
        ModelShape("llama2-13b", 40, 5120, 13824, 40, 40, 128, 32000),
        ModelShape("llama2-70b", 80, 8192, 28672, 64, 8, 128, 32000),
        ModelShape("llama3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    )
}
"""Published shapes, bfloat16."""
