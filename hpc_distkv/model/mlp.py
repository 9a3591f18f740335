"""The MLP of a layer, or of one of its experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
        return self.down(self.activated(wide))

    def activated(self, wide: Tensor) -> Tensor:
        """What `down` takes of what `up` gives."""
        if not self._gated:
            return self._activate(wide)
        gate, up = wide.chunk(2, dim=-1)
        return self._activate(gate).mul_(up)
