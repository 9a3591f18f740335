"""A mixture of experts: the MLP of a layer of which each token meets a part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.linear import Linear
from hpc_distkv.model.mlp import Mlp, Pause

MOST_GROUPS = 1023
"""Of one grouped product."""


class Experts:
    """A token's MLP is a weighted sum of those of the few experts that a router picks for it.

    Pairs of token and expert are sorted by expert, so every expert runs once a step, over all of
    its tokens: one after another, for which the host has to know how many each has, or all in one
    grouped product, for which only the device has to. Source: mixtures of experts with top-k
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
        """Whether the host waits for the router."""
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
        """The same, but new. What the host asks of the device depends on the shape of x alone."""
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
