"""MicroAttention: kernels, their choice, and the merge of partials."""

from hpc_distkv.attention.cache import write_kv
from hpc_distkv.attention.merge import merge, merge_rows
from hpc_distkv.attention.micro import micro_attention
from hpc_distkv.attention.paged import PagedBatch, PagedRow
from hpc_distkv.attention.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "PagedBatch",
    "PagedRow",
    "merge",
    "merge_rows",
    "micro_attention",
    "write_kv",
]
