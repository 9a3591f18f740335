"""The merge of partial attention results, exact up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_distkv.attention import reference
from hpc_distkv.attention.cpu import native
from hpc_distkv.attention.layout import index_on
from hpc_distkv.attention.triton import backend


def merge_rows(out: Tensor, lse: Tensor, rows: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge partial i, over other keys, into out[rows[i]] and lse[rows[i]], in place.

    out [T, H, D], lse [T, H] (natural), part_out [n, H, D], part_lse [n, H]: float32, contiguous;
    rows [n]: int32, each at most once, on the CPU or the device of the others; those on another
    device than the CPU are not compared with T. Raises ValueError for tensors that do not fit.

    Associative and commutative up to rounding; empty partials (out 0, lse -inf) change nothing.
    Source: DistAttention, arXiv 2401.02669, the aggregation over sub-blocks.
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
    if triton := backend.kernels(out.device):
        rows = index_on(out.device, rows, len(out), f"rows must lie in [0, {len(out)})")
        triton.merge_rows(out, lse, rows, part_out, part_lse)
        return
    kernels = native.kernels() if out.is_cpu and part_out.is_cpu and rows.is_cpu else None
    (kernels or reference).merge_rows(out, lse, rows, part_out, part_lse)
