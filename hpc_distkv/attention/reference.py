"""Rotation, MicroAttention, its merge and the cache write in plain torch: slow, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpc_distkv.attention.paged import Call
from hpc_distkv.attention.spec import AttentionSpec


class Rotation(NamedTuple):
    """cos and sin [T, 1, rotary_dim] of a step's tokens; sin carries the sign of the half."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Heads `x` [T, heads, head_dim], those of a token contiguous, at their positions; a new
    contiguous tensor. Numbers i and i + rotary_dim / 2 of a head turn as a pair; those beyond
    rotary_dim stay. In plain torch, on any device."""
    dim = rotation.cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], rotation), x[..., dim:]), dim=-1)
    swapped = torch.roll(x, dim // 2, dims=-1)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin)


QUERY_CHUNK = 256
"""Queries of a row that are scored at once: bounds the score matrix."""


def micro_attention(call: Call) -> None:
    """Raises ValueError where the batch's numbers do not fit the tensors."""
    q, k_cache, v_cache, batch, spec, causal, out, lse = call
    block_size = k_cache.shape[2]
    batch.check(q.shape[0], k_cache.shape[0], block_size)
    starts, block_starts = batch.query_start.tolist(), batch.block_start.tolist()
    within = torch.arange(block_size, device=q.device)
    for row, tokens in enumerate(batch.kv_len.tolist()):
        listed = slice(block_starts[row], block_starts[row + 1])
        blocks = batch.blocks[listed].to(q.device, torch.int64)
        first = batch.first_token[listed].to(q.device)
        key_position = (first[:, None] + within).flatten()[:tokens]
        k = _tokens(k_cache[blocks])[:, :tokens]
        v = _tokens(v_cache[blocks])[:, :tokens]
        for start in range(starts[row], starts[row + 1], QUERY_CHUNK):
            chunk = slice(start, min(start + QUERY_CHUNK, starts[row + 1]))
            position = int(batch.query_position[row]) - starts[row]
            query_position = position + torch.arange(chunk.start, chunk.stop, device=q.device)
            distance = query_position[:, None] - key_position
            _attend(q[chunk], k, v, spec, distance, causal, out[chunk], lse[chunk])


def _tokens(blocks: Tensor) -> Tensor:
    """[n, Hkv, block_size, D] -> float32 [Hkv, n * block_size, D]."""
    return blocks.transpose(0, 1).flatten(1, 2).float()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    distance: Tensor,
    causal: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`distance` [queries, keys]: position of the query minus that of the key."""
    grouped = (q.float() * spec.scale).reshape(q.shape[0], k.shape[0], -1, q.shape[2])
    scores = torch.einsum("qhgd,hkd->qhgk", grouped, k)
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if spec.slopes is not None:
        slopes = spec.slopes.to(q.device).reshape(1, k.shape[0], -1, 1)
        scores = scores - slopes * distance[:, None, None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if spec.window:
        seen &= distance < spec.window
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    total = scores.logsumexp(-1)
    weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
    out.copy_(torch.einsum("qhgk,hkd->qhgd", weights, v).flatten(1, 2))
    lse.copy_(total.flatten(1))


def merge_rows(out: Tensor, lse: Tensor, rows: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """As `merge.merge_rows`."""
    index = rows.to(out.device, torch.int64)
    mine, total = lse[index], torch.logaddexp(lse[index], part_lse)
    shift = total.masked_fill(total == -torch.inf, 0)
    kept = out[index] * torch.exp(mine - shift)[..., None]
    out[index] = kept + part_out * torch.exp(part_lse - shift)[..., None]
    lse[index] = total


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, offsets: Tensor
) -> None:
    """Store k[t], v[t] [T, Hkv, D] at cache[blocks[t], :, offsets[t]]."""
    index = blocks.to(k.device, torch.int64), slice(None), offsets.to(k.device, torch.int64)
    k_cache[index] = k
    v_cache[index] = v
