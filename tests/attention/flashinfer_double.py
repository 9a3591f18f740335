"""What the documentation of flashinfer-python 0.7.2 says of the wrapper that we use, in float64."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

NO_KEYS = -5e4
"""Its kernels' infinity: what the log-sum-exp of a query without keys is like is not documented."""


class BatchPrefillWithPagedKVCacheWrapper:
    made: ClassVar[list[BatchPrefillWithPagedKVCacheWrapper]] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "HND"
        assert backend == "fa2"
        self.backend, self.runs = backend, 0
        self.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 and table.is_contiguous() for table in tables)
        self.q_start, self.kv_start, self.indices, self.last = (table.tolist() for table in tables)
        assert len(self.q_start) == len(self.kv_start) == len(self.last) + 1
        assert self.kv_start[-1] == len(self.indices)
        assert all(1 <= last <= page_size for last in self.last)
        assert (q_data_type, kv_data_type) in ((t, t) for t in (torch.float16, torch.bfloat16))
        assert head_dim_qk in (64, 128, 256)
        self.shape = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self.causal, self.window, self.dtype = causal, window_left, q_data_type
        self.scale, self.cap = sm_scale, logits_soft_cap or 0.0

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool):
        assert return_lse
        self.runs += 1
        k_cache, v_cache = paged_kv_cache
        heads, kv_heads, dim, page = self.shape
        assert q.shape == (self.q_start[-1], heads, dim)
        assert q.dtype == k_cache.dtype == v_cache.dtype == self.dtype
        assert k_cache.shape[1:] == v_cache.shape[1:] == (kv_heads, page, dim)
        assert k_cache.stride() == v_cache.stride()
        out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2])
        for row, last in enumerate(self.last):
            pages = self.indices[self.kv_start[row] : self.kv_start[row + 1]]
            kv_len = (len(pages) - 1) * page + last
            k, v = (
                cache[pages].double().transpose(0, 1).flatten(1, 2)[:, :kv_len]
                for cache in (k_cache, v_cache)
            )
            mine = slice(self.q_start[row], self.q_start[row + 1])
            qo_len = mine.stop - mine.start
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                x = q[mine, head].double() @ k[kv_head].T * self.scale
                if self.cap:
                    x = self.cap * torch.tanh(x / self.cap)
                at = torch.arange(qo_len)[:, None] + kv_len - qo_len
                key = torch.arange(kv_len)
                if self.causal:
                    x = x.masked_fill(key > at, -math.inf)
                if self.window >= 0:
                    x = x.masked_fill(key < at - self.window, -math.inf)
                some = x.isfinite().any(-1)
                lse[mine, head] = torch.where(some, x.logsumexp(-1) / math.log(2), NO_KEYS).float()
                out[mine, head] = x.softmax(-1).nan_to_num(0.0) @ v[kv_head]
        return out.to(self.dtype), lse
