"""The MLP of a layer, one for all tokens or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.model.linear import Linear

Pause = Callable[[], None]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


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
        if not self._gated:
            return self.down(self._activate(wide))
        gate, up = wide.chunk(2, dim=-1)
        return self.down(self._activate(gate).mul_(up))


class Experts:
    """A token's MLP is a weighted sum of those of the few experts that a router picks for it.

    Tokens are sorted by expert, so every expert that is picked runs once a step, over all of its
    tokens. Source: mixtures of experts with top-k routing, arXiv 1701.06538 and 2101.03961.
    """

    def __init__(
        self, router: Linear, experts: Sequence[Mlp], per_token: int, normalise: bool
    ) -> None:
        """`router` hidden → experts; `normalise`: the weights of a token's experts sum to 1."""
        self.router, self.experts = router, experts
        self._per_token, self._normalise = per_token, normalise

    def __call__(self, x: Tensor, pause: Pause) -> Tensor:
        """x [rows, hidden] → [rows, hidden]; `pause` is called between the experts."""
        weights, chosen = self._route(x)
        order = chosen.flatten().argsort(stable=True)
        gathered = x[order // self._per_token]
        mixed = torch.empty_like(gathered)
        start = 0
        for expert, rows in enumerate(chosen.flatten().bincount().tolist()):
            if rows:
                part = slice(start, start + rows)
                mixed[order[part]] = self.experts[expert](gathered[part], pause)
                pause()
            start += rows
        return torch.bmm(weights[:, None], mixed.view(len(x), self._per_token, -1))[:, 0]

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [rows, per_token] in x's dtype, and experts [rows, per_token] int64."""
        shares = self.router(x).float().softmax(-1)
        weights, chosen = shares.topk(self._per_token, dim=-1)
        if self._normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen
