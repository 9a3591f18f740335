"""MicroAttention: kernels, their choice, and the merge of partials."""

from hpc_distkv.attention.cache import rotate_and_write
from hpc_distkv.attention.merge import merge_rows
from hpc_distkv.attention.micro import micro_attention
from hpc_distkv.attention.paged import PagedBatch, PagedRow
from hpc_distkv.attention.reference import Rotation
from hpc_distkv.attention.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "PagedBatch",
    "PagedRow",
    "Rotation",
    "merge_rows",
    "micro_attention",
    "rotate_and_write",
]
