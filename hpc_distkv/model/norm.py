"""The norms of all families."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
