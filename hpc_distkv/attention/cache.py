"""Writing new keys and values into their rBlocks."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_distkv.attention import launch, native, reference
from hpc_distkv.attention.layout import inner_contiguous
from hpc_distkv.attention.staging import index_on


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, offsets: Tensor
) -> None:
    """Store k[t], v[t] at cache[blocks[t], :, offsets[t]].

    k, v: [T, Hkv, D], possibly views of a fused projection (only the first stride is free);
    k_cache, v_cache: [N, Hkv, block_size, D], likewise; all of one dtype. blocks, offsets: int32
    [T], contiguous, on the CPU or the device of the others. Raises ValueError for tensors that do
    not fit, and for slots out of range before anything is written; slots on another device than the
    CPU are not compared with the cache.
    """
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"{k.dtype} and {v.dtype} do not fit a cache of {k_cache.dtype}")
    if k.dim() != 3 or k.shape != v.shape or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "k and v must be [T, Hkv, D], the caches [N, Hkv, block_size, D], not "
            f"{[*k.shape]}, {[*v.shape]}, {[*k_cache.shape]} and {[*v_cache.shape]}"
        )
    tokens, heads, dim = k.shape
    if (heads, dim) != (k_cache.shape[1], k_cache.shape[3]):
        raise ValueError(f"k {[*k.shape]} does not fit a cache {[*k_cache.shape]}")
    if not (inner_contiguous(k_cache) and inner_contiguous(v_cache)):
        raise ValueError("the KV heads of an rBlock must lie contiguous in k_cache and v_cache")
    if not (inner_contiguous(k) and inner_contiguous(v)):
        raise ValueError("the heads of a token must lie contiguous in k and v")
    for slots in (blocks, offsets):
        if slots.dtype != torch.int32 or slots.shape != (tokens,):
            raise ValueError(f"blocks and offsets must be int32 [{tokens}]")
        if not slots.is_contiguous():
            raise ValueError("blocks and offsets must be contiguous")
    if triton := launch.kernels(k_cache.device):
        num_blocks, _, block_size, _ = k_cache.shape
        refusal = f"blocks must lie in [0, {num_blocks}) and offsets in [0, {block_size})"
        blocks = index_on(k_cache.device, blocks, num_blocks, refusal)
        offsets = index_on(k_cache.device, offsets, block_size, refusal)
        triton.write_kv(k, v, k_cache, v_cache, blocks, offsets)
        return
    all_cpu = k.is_cpu and k_cache.is_cpu and v_cache.is_cpu and blocks.is_cpu and offsets.is_cpu
    kernels = native.kernels() if all_cpu else None
    (kernels or reference).write_kv(k, v, k_cache, v_cache, blocks, offsets)
