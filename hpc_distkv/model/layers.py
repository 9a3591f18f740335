"""What the layers of a decoder are made of: linear layers, norms, MLPs and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.model.config import ModelConfig

Pause = Callable[[], None]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
MOST_GROUPS = 1023
"""Of one grouped product."""
_PACK_ROWS = 32
"""The batch for which oneDNN chooses the layout; the same one won from 1 to 256 rows."""


class Linear:
    """y = x · weightᵀ + bias. Starts in plain layout, which can be sliced; `pack` ends that."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` [out, in], `bias` [out], of one dtype and device."""
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None

    def pack(self, keep: bool = False) -> None:
        """Reorder the weight once into oneDNN's blocked layout, on a CPU that has fast code for it.

        Saves the reordering that every call would do: 1.3 to 2 times faster up to 64 rows. The
        plain weight is given up unless `keep` (it is shared, as a tied embedding is). On other
        devices and dtypes nothing happens.
        """
        if self._packed is None and _can_pack(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACK_ROWS)
            if not keep:
                self.weight = self.weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out]."""
        if self._packed is None:
            return functional.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


class Norm:
    """RMSNorm (arXiv 1910.07467) with a weight alone, LayerNorm with a weight and a bias.

    A weight [heads, dim] norms each head by itself. A weight of another dtype than the activations
    is one that may not be rounded: then the whole norm is computed in it.
    """

    def __init__(self, eps: float, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` [dim] or [heads, dim]; `bias` [dim]."""
        self.eps, self.weight, self.bias = eps, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, dim] or [rows, heads, dim] → the same shape and dtype."""
        weight = self.weight
        if self.bias is not None:
            return functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)
        if weight.dim() == 1 and weight.dtype == x.dtype:
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        normed = functional.rms_norm(x.to(weight.dtype), weight.shape[-1:], None, self.eps)
        return (normed * weight).to(x.dtype)


class Mlp:
    """down(act(gate(x)) · up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, up: Linear, down: Linear, activation: str, gated: bool) -> None:
        """`up`: with a gate, the rows of gate and up, one after another."""
        self.up, self.down, self._gated = up, down, gated
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: Tensor, pause: Pause) -> Tensor:
        """x [rows, hidden] → [rows, hidden]; `pause` is called between the linear layers."""
        wide = self.up(x)
        pause()
        return self.down(self.activated(wide))

    def activated(self, wide: Tensor) -> Tensor:
        """The input of `down` for the output `wide` of `up`."""
        if not self._gated:
            return self._activate(wide)
        gate, up = wide.chunk(2, dim=-1)
        return self._activate(gate).mul_(up)


class Experts:
    """A token's MLP is a weighted sum of those of the few experts that a router picks for it.

    Pairs of token and expert are sorted by expert, so every expert runs once a step, over all of
    its tokens: one after another, for which the host must read how many each has, or all in one
    grouped product, without a sync. Source: mixtures of experts with top-k
    routing, arXiv 1701.06538 and 2101.03961.
    """

    def __init__(
        self,
        router: Linear,
        experts: Sequence[Mlp],
        per_token: int,
        normalise: bool,
        stacks: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`router` hidden → experts; `normalise`: the weights of a token's experts sum to 1.
        `stacks`, to compute all at once: the weights [experts, out, in] of all `up` and of all
        `down`, of which those of the experts, which have no biases, are views."""
        self.router, self.experts = router, experts
        self._per_token, self._normalise, self._stacks = per_token, normalise, stacks
        self._numbers = torch.arange(len(experts), device=router.weight.device)

    @property
    def waits(self) -> bool:
        """Whether the host reads what the router has chosen, which is a sync."""
        return self._stacks is None

    def __call__(self, x: Tensor, pause: Pause) -> Tensor:
        """x [rows, hidden] → [rows, hidden]; `pause` is called between the large operators. The sum
        over a token's experts has the order of the router's choice, whatever the other rows are."""
        weights, chosen = self._route(x)
        picks, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(picks, self._numbers, right=True, out_int32=True)
        compute = partial(self._at_once, *self._stacks) if self._stacks else self._one_by_one
        mixed = compute(x[order // self._per_token], ends, pause)
        placed = torch.empty_like(mixed).index_copy_(0, order, mixed)
        return placed.view(*weights.shape, -1).mul_(weights[..., None]).sum(1)

    def _one_by_one(self, x: Tensor, ends: Tensor, pause: Pause) -> Tensor:
        """In place: x [pairs, hidden], up to row `ends` [experts] of each by that expert."""
        for expert, part in zip(self.experts, x.tensor_split(ends[:-1].tolist()), strict=True):
            if len(part):
                part.copy_(expert(part, pause))
                pause()
        return x

    def _at_once(self, up: Tensor, down: Tensor, x: Tensor, ends: Tensor, pause: Pause) -> Tensor:
        """As `_one_by_one`, into a new tensor. The kernels depend on the shape of x alone."""
        wide = functional.grouped_mm(x, up.mT, offs=ends)
        pause()
        inner = self.experts[0].activated(wide)  # all are of one kind
        return functional.grouped_mm(inner, down.mT, offs=ends)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [rows, per_token] float32, and experts [rows, per_token] int64."""
        shares = self.router(x).float().softmax(-1)
        weights, chosen = shares.topk(self._per_token, dim=-1)
        if self._normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen


def grouped(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the experts of a model, or of the shard that `config` is of, are best computed at
    once: where torch has a kernel for it, and does not itself copy the ends of the groups to the
    host and loop over them.

    * It has none for CPUs. Its loop there is slower than ours, whose weights are packed, and in
      float32 the bits of a row would depend on how many others its expert has.
    * `grouped_mm` came with torch 2.10.
    * The kernel is CUDA's, for bfloat16 on GPUs of compute capability 9 and 10 (Hopper, and the
      Blackwell of data centres).
    * It reads rows of whole 16 bytes, takes no biases, and so many groups.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and hasattr(functional, "grouped_mm")
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
        and config.hidden_size * dtype.itemsize % 16 == 0
        and config.intermediate_size * dtype.itemsize % 16 == 0
        and not config.mlp_bias
        and config.num_experts <= MOST_GROUPS
    )


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
