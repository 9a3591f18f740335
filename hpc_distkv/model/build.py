"""A decoder with all weights allocated and none filled."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder, Layer
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.layers import Experts, Linear, Mlp, Norm, grouped
from hpc_distkv.model.shard import ModelShard


def empty_decoder(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: ModelShard
) -> Decoder:
    """The shard of the decoder that `config` describes, its weights of `dtype` on `device`. Raises
    ModelError if the model cannot be cut so."""
    try:
        return _Builder(shard.config(config), dtype, device, shard).decoder()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # so torch calls it on CPUs
        raise ModelError(
            "the weights that config.json describes cannot be given memory: "
            f"{str(error).splitlines()[0]}"
        ) from error


class _Builder:
    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: ModelShard
    ) -> None:
        self._config, self._family = config, config.family
        self._dtype, self._device, self._shard = dtype, device, shard

    def decoder(self) -> Decoder:
        config, family = self._config, self._family
        hidden = config.hidden_size
        vocabulary = len(self._shard.vocabulary(config.vocab_size)[self._shard.lane])
        embedding = self._empty(vocabulary, hidden)
        learned = family.positions == "learned"
        head = embedding if config.tie_embeddings else self._empty(vocabulary, hidden)
        return Decoder(
            config,
            embedding=embedding,
            positions=self._empty(config.max_position, hidden) if learned else None,
            embedding_norm=self._norm(hidden) if family.embedding_norm else None,
            layers=[self._layer() for _ in range(config.num_layers)],
            norm=self._norm(hidden),
            head=Linear(head),
            shard=self._shard,
        )

    def _layer(self) -> Layer:
        config, family = self._config, self._family
        hidden = config.hidden_size
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        return Layer(
            attention_norm=self._norm(hidden),
            qkv=self._linear((heads + 2 * kv_heads) * dim, hidden, config.qkv_bias),
            qk_norm=self._norm(heads + kv_heads, dim) if family.qk_norm else None,
            out=self._linear(hidden, heads * dim, config.out_bias),
            attention_post_norm=self._norm(hidden) if family.post_norms else None,
            mlp_norm=self._norm(hidden),
            mlp=self._experts() if config.num_experts else self._mlp(),
            mlp_post_norm=self._norm(hidden) if family.post_norms else None,
        )

    def _experts(self) -> Experts:
        config = self._config
        count, hidden, size = config.num_experts, config.hidden_size, config.intermediate_size
        if grouped(config, self._dtype, self._device):
            ups, downs = self._empty(count, self._wide, hidden), self._empty(count, hidden, size)
            stacks = ups, downs
            linears = [(Linear(up), Linear(down)) for up, down in zip(ups, downs, strict=True)]
            experts = [Mlp(*pair, config.activation, self._family.gated) for pair in linears]
        else:
            stacks, experts = None, [self._mlp() for _ in range(count)]
        router = self._linear(count, hidden, bias=False)
        return Experts(router, experts, config.experts_per_token, config.normalise_experts, stacks)

    def _mlp(self) -> Mlp:
        config = self._config
        up = self._linear(self._wide, config.hidden_size, config.mlp_bias)
        down = self._linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        return Mlp(up, down, config.activation, self._family.gated)

    @property
    def _wide(self) -> int:
        """Outputs of the first linear layer of an MLP."""
        return (2 if self._family.gated else 1) * self._config.intermediate_size

    def _linear(self, rows: int, columns: int, bias: bool) -> Linear:
        return Linear(self._empty(rows, columns), self._empty(rows) if bias else None)

    def _norm(self, *shape: int) -> Norm:
        """Weights near an offset would lose digits in a half precision dtype: they are float32."""
        dtype = torch.float32 if self._family.norm_offset else self._dtype
        weight = torch.empty(shape, dtype=dtype, device=self._device)
        bias = self._empty(*shape) if self._family.norm == "layer" else None
        return Norm(self._config.norm_eps, weight, bias)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)
