"""The batch a kernel works on: ragged queries over paged rBlocks; and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from hpc_distkv.attention.spec import AttentionSpec

T = TypeVar("T")


class PagedRow(NamedTuple):
    """One row as plain Python numbers, for `PagedBatch.build`."""

    queries: int
    query_position: int
    blocks: Sequence[int]
    first_token: Sequence[int]
    kv_len: int


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """Ragged queries over paged rBlocks: R rows, B rBlocks in all.

    A row has one query (decode), many (a prefill chunk) or none. Its rBlocks may have holes, where
    other ranks hold the tokens between; all are full but possibly the last. The tensors are int32,
    on the CPU, contiguous. Raises ValueError if they are not, or if their lengths disagree.
    """

    query_start: Tensor
    """[R+1] row r owns queries query_start[r]:query_start[r+1]."""
    query_position: Tensor
    """[R] position, in its sequence, of the row's first query."""
    block_start: Tensor
    """[R+1] row r attends to blocks[block_start[r]:block_start[r+1]]."""
    blocks: Tensor
    """[B] indices into the cache's first dimension."""
    first_token: Tensor
    """[B] position of the first token of each of those rBlocks."""
    kv_len: Tensor
    """[R] tokens present in the row's rBlocks."""

    def __post_init__(self) -> None:
        rows, blocks = self.kv_len.numel(), self.blocks.numel()
        lengths = (rows + 1, rows, rows + 1, blocks, blocks, rows)
        for field, length in zip(fields(self), lengths, strict=True):
            tensor: Tensor = getattr(self, field.name)
            if tensor.dtype != torch.int32 or not tensor.is_cpu:
                raise ValueError(f"{field.name} must be int32 on the CPU, not {tensor.dtype}")
            if tensor.shape != (length,) or not tensor.is_contiguous():
                raise ValueError(
                    f"{field.name} must be contiguous of shape [{length}], not {[*tensor.shape]}"
                )

    @classmethod
    def build(cls, rows: Sequence[PagedRow]) -> PagedBatch:
        """Lay out rows of plain numbers. Raises ValueError if a row's lists differ in length."""
        for index, row in enumerate(rows):
            if len(row.blocks) != len(row.first_token):
                raise ValueError(
                    f"row {index} has {len(row.blocks)} blocks but {len(row.first_token)} positions"
                )
        return cls(
            query_start=_int32([0, *accumulate(row.queries for row in rows)]),
            query_position=_int32([row.query_position for row in rows]),
            block_start=_int32([0, *accumulate(len(row.blocks) for row in rows)]),
            blocks=_int32([block for row in rows for block in row.blocks]),
            first_token=_int32([token for row in rows for token in row.first_token]),
            kv_len=_int32([row.kv_len for row in rows]),
        )

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned the first time for this key: what kernels need of a batch in every
        layer is worked out, and copied to a device, once."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(T, self._derived[key])

    def remember(self, key: Hashable, made: object) -> None:
        """Have `derived` return this."""
        self._derived[key] = made

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def check(self, queries: int, num_blocks: int, block_size: int) -> None:
        """Compare the numbers with a call's shapes. Raises ValueError naming the first bad row.

        Reads every tensor: kernels that check by themselves call it only to explain a refusal.
        """
        starts, block_starts = self.query_start.tolist(), self.block_start.tolist()
        if starts[0] != 0 or block_starts[0] != 0:
            raise ValueError("query_start and block_start must begin with 0")
        for row, tokens in enumerate(self.kv_len.tolist()):
            count = block_starts[row + 1] - block_starts[row]
            if starts[row + 1] < starts[row] or count < 0:
                raise ValueError(f"row {row} ends before it starts")
            if not 0 <= tokens <= count * block_size:
                raise ValueError(
                    f"row {row} has kv_len {tokens}, but {count} rBlocks of {block_size} tokens"
                )
        if starts[-1] != queries:
            raise ValueError(f"the rows own {starts[-1]} queries, but q has {queries}")
        if block_starts[-1] != self.blocks.numel():
            raise ValueError(
                f"the rows own {block_starts[-1]} rBlocks, but {self.blocks.numel()} are listed"
            )
        if self.blocks.numel() and not 0 <= int(self.blocks.min()) <= int(self.blocks.max()) < (
            num_blocks
        ):
            raise ValueError(f"blocks must lie in [0, {num_blocks})")


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
