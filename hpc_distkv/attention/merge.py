"""The merge of partial attention results, exact up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_distkv.attention import launch, native, reference
from hpc_distkv.attention.layout import index_on


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge partials over disjoint keys: outs [T, H, D] and lses [T, H] (natural), float32.

    Returns the (out, lse) of all keys together. Associative and commutative up to rounding; empty
    partials (out 0, lse -inf) change nothing. Raises ValueError without partials or for shapes that
    differ. Source: DistAttention, arXiv 2401.02669, the aggregation over sub-blocks.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{len(outs)} outs and {len(lses)} lses: give as many of both, at least 1")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(f"partials differ: out {[*out.shape]}, lse {[*lse.shape]}")
    merged = outs[0].clone(memory_format=torch.contiguous_format)
    total = lses[0].clone(memory_format=torch.contiguous_format)
    rows = torch.arange(merged.shape[0], dtype=torch.int32)
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        merge_rows(merged, total, rows, out.contiguous(), lse.contiguous())
    return merged, total


def merge_rows(out: Tensor, lse: Tensor, rows: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge partial i into out[rows[i]] and lse[rows[i]], in place.

    out [T, H, D], lse [T, H], part_out [n, H, D], part_lse [n, H]: float32, contiguous; rows [n]:
    int32, each at most once, on the CPU or the device of the others; those on another device than
    the CPU are not compared with T. Raises ValueError for tensors that do not fit.
    """
    if not out.dtype == lse.dtype == part_out.dtype == part_lse.dtype == torch.float32:
        raise ValueError("outputs and log-sum-exps must be float32")
    if rows.dtype != torch.int32 or rows.dim() != 1:
        raise ValueError(f"rows must be int32 [n], not {rows.dtype} {[*rows.shape]}")
    parts = (rows.shape[0], *out.shape[1:])
    if part_out.shape != parts or part_lse.shape != parts[:2] or lse.shape != out.shape[:2]:
        raise ValueError(
            f"partials {[*part_out.shape]}, {[*part_lse.shape]} of {rows.shape[0]} rows do not fit "
            f"out {[*out.shape]}, lse {[*lse.shape]}"
        )
    for tensor in (out, lse, rows, part_out, part_lse):
        if not tensor.is_contiguous():
            raise ValueError("merge_rows needs contiguous tensors")
    if triton := launch.kernels(out.device):
        rows = index_on(out.device, rows, len(out), f"rows must lie in [0, {len(out)})")
        triton.merge_rows(out, lse, rows, part_out, part_lse)
        return
    kernels = native.kernels() if out.is_cpu and part_out.is_cpu and rows.is_cpu else None
    (kernels or reference).merge_rows(out, lse, rows, part_out, part_lse)
