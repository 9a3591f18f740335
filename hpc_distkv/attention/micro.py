"""MicroAttention: the one function, and the one place where its kernel is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_distkv.attention import reference
from hpc_distkv.attention.cpu import native
from hpc_distkv.attention.layout import inner_contiguous
from hpc_distkv.attention.paged import Call, PagedBatch
from hpc_distkv.attention.spec import AttentionSpec
from hpc_distkv.attention.triton import backend

STREAM_LINES = {torch.float32: 12, torch.bfloat16: 48, torch.float16: 12}
"""Up to this many lines (queries of a row x query heads per KV head) a row takes the streaming
kernel, which reads K and V in place; beyond, the tiled products win, though they transpose K first.
Measured on Zen 4: equal at 12 to 16 lines, for bfloat16 later, as its scores need no widening
there. Beyond 48 a stream would still be as fast alone, but read memory too often beside others."""

DIM_STEP, DIM_MOST = 16, 256
"""The C kernels work on whole vectors and keep an item's scratch in the L2 cache of a core."""


def micro_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    spec: AttentionSpec,
    *,
    causal: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ragged queries over the rBlocks that this rank holds for them.

    q: [T, H, D], float32, bfloat16 or float16; k_cache, v_cache: [N, Hkv, block_size, D] of the
    same dtype, where H is a multiple of Hkv and query head h reads KV head h // (H // Hkv). All
    but their first dimension is contiguous. causal: a query at position p sees the keys at
    positions <= p; otherwise it sees all of its row's keys. Either way the window of `spec` hides
    those behind it, and its other options shape the scores; positions are those of `batch`.

    Returns out [T, H, D] and lse [T, H], float32: the normalised output and the natural logarithm
    of the sum of exp(score). A query without keys has out 0 and lse -inf. `out` and `lse` may be
    given, contiguous, to be filled. On a CPU a row's result does not depend, to the bit, on the
    other rows or (C kernels) on the number of threads. Raises ValueError for tensors or a batch
    that do not fit.

    Source: DistAttention, arXiv 2401.02669, with (MA, e, m) kept as (out, lse) = (MA/e, m + log e).
    """
    _check(q, k_cache, v_cache)
    if spec.slopes is not None and spec.slopes.shape[0] != q.shape[1]:
        raise ValueError(f"{spec.slopes.shape[0]} slopes do not fit the {q.shape[1]} heads of q")
    out = _output(out, q.shape, q.device, "out")
    lse = _output(lse, q.shape[:2], q.device, "lse")
    triton = backend.kernels(q.device)
    call = Call(q, k_cache, v_cache, batch, spec, causal, out, lse)
    if triton and triton.serves(q, k_cache, spec):
        triton.micro_attention(call)
    elif _native_shape(q) and (kernels := native.kernels()):
        kernels.micro_attention(call, STREAM_LINES[q.dtype])
    else:
        reference.micro_attention(call)
    return out, lse


def _native_shape(q: Tensor) -> bool:
    dim = q.shape[2]
    return q.is_cpu and dim % DIM_STEP == 0 and 0 < dim <= DIM_MOST


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if q.dtype not in native.DTYPES or not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            "q, k_cache and v_cache must share one of float32, bfloat16 and float16, not "
            f"{q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "q must be [T, H, D], k_cache and v_cache [N, Hkv, block_size, D], not "
            f"{[*q.shape]}, {[*k_cache.shape]} and {[*v_cache.shape]}"
        )
    _, kv_heads, block_size, dim = k_cache.shape
    if q.shape[2] != dim or not kv_heads or q.shape[1] % kv_heads or not block_size:
        raise ValueError(
            f"q {[*q.shape]} does not fit a cache of {kv_heads} KV heads of dimension {dim} and "
            f"rBlocks of {block_size} tokens"
        )
    if not (inner_contiguous(k_cache) and inner_contiguous(v_cache)):
        raise ValueError("the KV heads of an rBlock must lie contiguous in k_cache and v_cache")
    if not inner_contiguous(q):
        raise ValueError("the heads of a query must lie contiguous in q")
    if not (q.is_cpu and k_cache.is_cpu and v_cache.is_cpu) and not (
        q.device == k_cache.device == v_cache.device
    ):
        raise ValueError(f"q is on {q.device}, the cache on {k_cache.device}, {v_cache.device}")


def _output(given: Tensor | None, shape: torch.Size, device: torch.device, name: str) -> Tensor:
    if given is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if given.shape != shape or given.dtype != torch.float32 or not given.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 {[*shape]}, not {[*given.shape]}")
    return given
