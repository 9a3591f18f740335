"""What a batch has the attention kernel launched for, worked out on the host."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpc_distkv.attention.paged import PagedBatch
from hpc_distkv.attention.spec import AttentionSpec
from hpc_distkv.attention.triton import tuning
from hpc_distkv.attention.triton.tuning import Kernel, Processors, Shape
from hpc_distkv.attention.triton.worklist import ITEM_SIZE, MERGE_SIZE, Ints, KeyIndex
from hpc_distkv.comm.device import upload


@dataclass(frozen=True)
class Launch:
    """One launch of the attention kernel."""

    kernel: Kernel
    items: Tensor
    programs: int
    positions: bool
    """Whether masks need the positions of keys."""


@dataclass(frozen=True)
class LaunchPlan:
    """The launches of a batch, with what they read on the device."""

    launches: list[Launch]
    blocks: Tensor
    first_token: Tensor
    merges: Tensor
    split: int
    """Queries whose keys were split."""
    partials: int
    most_parts: int

    @classmethod
    def of(
        cls,
        q: Tensor,
        k_cache: Tensor,
        batch: PagedBatch,
        spec: AttentionSpec,
        processors: Processors,
        *,
        causal: bool,
    ) -> LaunchPlan:
        """Rows of few and of many lines each by their kernel, cut as `tuning` says. Raises
        ValueError where the batch's numbers do not fit the tensors."""
        shape = Shape.of(q, k_cache)
        num_blocks, _, block_size, _ = k_cache.shape
        batch.check(len(q), num_blocks, block_size)
        index = KeyIndex(batch, block_size)
        few = tuning.decode_kernel(shape, processors)
        many = tuning.prefill_kernel(shape, processors)
        is_few = index.counts * shape.group <= few.lines
        partials, launches, merges = 0, [], [np.empty((0, 4), np.int64)]
        for kernel, chosen in ((few, is_few), (many, ~is_few)):
            rows = np.flatnonzero(chosen & (index.counts > 0))
            if not rows.size:
                continue
            queries = kernel.lines // shape.group
            tiles = index.tiles(rows, queries, causal=causal, window=spec.window)
            chunk = tuning.chunk(tiles.lengths, shape.kv_heads, kernel, processors)
            items, merge, partials = tiles.cut(chunk, kernel.keys, partials)
            launches.append((kernel, items, not tiles.exact))
            merges.append(merge)
        merge = np.concatenate(merges)
        lists = [_flat(numbers) for numbers in (merge, *(items for _, items, _ in launches))]
        blocks, first_token, on_device, *items_on_device = upload(
            [batch.blocks, batch.first_token, *lists], q.device
        )
        return cls(
            [
                Launch(kernel, there, len(items) * shape.kv_heads, positions)
                for (kernel, items, positions), there in zip(launches, items_on_device, strict=True)
            ],
            blocks,
            first_token,
            on_device,
            len(merge),
            partials,
            int(merge[:, 3].max(initial=1)),
        )

    @property
    def form(self) -> Hashable:
        """What its launches depend on, numbers on the device aside: plans of one form can take each
        other's numbers."""
        launches = [(at.kernel, _room(_items(at)), at.positions) for at in self.launches]
        sizes = len(self.blocks), self.split, self.partials, self.most_parts
        return (*launches, *map(_room, sizes))

    def roomy(self) -> LaunchPlan:
        """A plan with room for the numbers of any plan of this form, to be launched whatever they
        are: programs without an item do nothing, and merges may be made twice."""

        def room(tensor: Tensor, rows: int, columns: int = 1) -> Tensor:
            return tensor.new_zeros(_room(rows) * columns)

        launches = [
            replace(
                at,
                items=room(at.items, _items(at), ITEM_SIZE),
                programs=at.programs // _items(at) * _room(_items(at)),
            )
            for at in self.launches
        ]
        return LaunchPlan(
            launches,
            room(self.blocks, len(self.blocks)),
            room(self.first_token, len(self.first_token)),
            room(self.merges, self.split, MERGE_SIZE),
            _room(self.split),
            _room(self.partials),
            _room(self.most_parts),
        )

    def take(self, other: LaunchPlan) -> None:
        """The numbers of a plan of the form that this one was made roomy from."""
        pairs = [(self.blocks, other.blocks), (self.first_token, other.first_token)]
        for mine, theirs in zip(self.launches, other.launches, strict=True):
            mine.items.zero_()
            pairs.append((mine.items, theirs.items))
        if self.split:
            self.merges.view(-1, MERGE_SIZE).copy_(other.merges[:MERGE_SIZE])
            pairs.append((self.merges, other.merges))
        torch._foreach_copy_(
            [mine[: theirs.numel()] for mine, theirs in pairs], [theirs for _, theirs in pairs]
        )


def plan_key(q: Tensor, k_cache: Tensor, spec: AttentionSpec, *, causal: bool) -> Hashable:
    """What a batch keeps its plan for such a call under."""
    shape = Shape.of(q, k_cache)
    return q.device, shape, causal, spec.window, len(q), len(k_cache), k_cache.shape[2]


def _flat(numbers: Ints) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32).reshape(-1))


def _items(launch: Launch) -> int:
    return launch.items.numel() // ITEM_SIZE


def _room(size: int) -> int:
    return tuning.power_of_two(size) if size else 0
