"""New queries, keys and values at their positions, and the latter two into their rBlocks."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_distkv.attention import reference
from hpc_distkv.attention.cpu import native
from hpc_distkv.attention.layout import index_on, inner_contiguous
from hpc_distkv.attention.reference import Rotation, rotate
from hpc_distkv.attention.triton import backend


def rotate_and_write(
    qk: Tensor,
    v: Tensor,
    rotation: Rotation | None,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Turn queries and keys by `rotation`, if there is one; store the keys and v[t] at
    cache[blocks[t], :, offsets[t]]; return the queries [T, H, D].

    qk: [T, H + Hkv, D], queries and keys, v: [T, Hkv, D], possibly views of a fused projection
    (only the first stride is free); k_cache, v_cache: [N, Hkv, block_size, D], likewise; all of one
    dtype, as the tables [T, 1, at most D] of `rotation`. blocks, offsets: int32 [T], contiguous, on
    the CPU or the device of the others. Raises ValueError for tensors that do not fit, and for
    slots out of range before anything is written; slots on another device than the CPU are not
    compared with the cache.
    """
    _check(qk, v, rotation, k_cache, v_cache, blocks, offsets)
    if triton := backend.kernels(k_cache.device):
        num_blocks, _, block_size, _ = k_cache.shape
        refusal = f"blocks must lie in [0, {num_blocks}) and offsets in [0, {block_size})"
        blocks = index_on(k_cache.device, blocks, num_blocks, refusal)
        offsets = index_on(k_cache.device, offsets, block_size, refusal)
        return triton.rotate_and_write(qk, v, rotation, k_cache, v_cache, blocks, offsets)
    if rotation is not None:
        qk = rotate(qk, rotation)
    heads = qk.shape[1] - v.shape[1]
    all_cpu = qk.is_cpu and k_cache.is_cpu and v_cache.is_cpu and blocks.is_cpu and offsets.is_cpu
    kernels = native.kernels() if all_cpu else None
    (kernels or reference).write_kv(qk[:, heads:], v, k_cache, v_cache, blocks, offsets)
    return qk[:, :heads]


def _check(
    qk: Tensor,
    v: Tensor,
    rotation: Rotation | None,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: Tensor,
    offsets: Tensor,
) -> None:
    if not qk.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"{qk.dtype} and {v.dtype} do not fit a cache of {k_cache.dtype}")
    if qk.dim() != 3 or v.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "qk must be [T, H + Hkv, D], v [T, Hkv, D], the caches [N, Hkv, block_size, D], not "
            f"{[*qk.shape]}, {[*v.shape]}, {[*k_cache.shape]} and {[*v_cache.shape]}"
        )
    tokens, heads, dim = v.shape
    if (len(qk), qk.shape[2]) != (tokens, dim) or qk.shape[1] < heads:
        raise ValueError(f"qk {[*qk.shape]} and v {[*v.shape]} are not of the same tokens")
    if (heads, dim) != (k_cache.shape[1], k_cache.shape[3]):
        raise ValueError(f"v {[*v.shape]} does not fit a cache {[*k_cache.shape]}")
    if not (inner_contiguous(k_cache) and inner_contiguous(v_cache)):
        raise ValueError("the KV heads of an rBlock must lie contiguous in k_cache and v_cache")
    if not (inner_contiguous(qk) and inner_contiguous(v)):
        raise ValueError("the heads of a token must lie contiguous in qk and v")
    for table in rotation or ():
        if table.shape[:2] != (tokens, 1) or table.shape[2] > dim or table.dtype != qk.dtype:
            raise ValueError(
                f"a rotation {table.dtype} {[*table.shape]} does not fit qk {qk.dtype} "
                f"{[*qk.shape]}"
            )
    for slots in (blocks, offsets):
        if slots.dtype != torch.int32 or slots.shape != (tokens,):
            raise ValueError(f"blocks and offsets must be int32 [{tokens}]")
        if not slots.is_contiguous():
            raise ValueError("blocks and offsets must be contiguous")
