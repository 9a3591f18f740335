"""One call of MicroAttention, as its backends get it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hpc_distkv.attention.paged import PagedBatch
from hpc_distkv.attention.spec import AttentionSpec


class Call(NamedTuple):
    """The arguments of `micro.micro_attention`; dtypes, shapes and strides have been checked."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: PagedBatch
    spec: AttentionSpec
    causal: bool
    out: Tensor
    """To be filled, as `lse`."""
    lse: Tensor
