"""How a layer scores a query against a key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MOST_WINDOW = 2**31 - 1


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """The options of one layer's attention; all but the scale are off unless given.

    A query at position p and a key at position j have the score cap(scale · q·k) − slope · (p − j),
    where cap(x) = softcap · tanh(x / softcap). Raises ValueError for options that make no sense.

    Sources: ALiBi, arXiv 2108.12409; sliding windows, arXiv 2310.06825; soft-capping, arXiv
    2408.00118.
    """

    scale: float
    window: int = 0
    """Keys that a query sees, its own included: p − window < j; 0: all."""
    softcap: float = 0.0
    """Bound of the scaled products; 0: none."""
    slopes: Tensor | None = None
    """ALiBi's slope of each query head: float32 [H] on the CPU, contiguous; None: no bias."""

    @property
    def positional(self) -> bool:
        """Whether the position of a query decides on more than which keys it sees as past."""
        return self.window > 0 or self.slopes is not None

    def __post_init__(self) -> None:
        if not 0 <= self.window <= MOST_WINDOW or not self.softcap >= 0:
            raise ValueError(
                f"window {self.window} and softcap {self.softcap} must not be negative, nor the "
                f"window above {MOST_WINDOW}"
            )
        if self.slopes is not None and (
            self.slopes.dtype != torch.float32
            or self.slopes.dim() != 1
            or not self.slopes.is_cpu
            or not self.slopes.is_contiguous()
        ):
            raise ValueError("slopes must be float32 [H] on the CPU, contiguous")

    def slopes_on(self, device: torch.device) -> Tensor | None:
        """The slopes on `device`, copied there once."""
        if self.slopes is None:
            return None
        if device not in self._copies:
            self._copies[device] = self.slopes.to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}
