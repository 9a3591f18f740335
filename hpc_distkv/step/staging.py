"""Attention of the device to rBlocks in the host's memory, copied to it piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, merge_rows, micro_attention
from hpc_distkv.comm.device import Event
from hpc_distkv.comm.transport import Comm
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.step.sizes import BUFFERS, PIECE_BLOCKS

QueryGroup = list[PagedRow]
"""Rows of queries to the same rBlocks in the host's memory."""


class Piece(NamedTuple):
    """Some rBlocks of one group in a layer, copied at once."""

    queries: slice
    """The group's, among all that are staged."""
    slots: list[int]
    """In the host's memory."""
    batch: PagedBatch
    """The group's rows over a buffer that holds these rBlocks in this order."""


class Buffer(NamedTuple):
    """Room for one piece on the device."""

    rblocks: list[torch.Tensor]
    """[2, kv_heads, block_size, head_dim] each."""
    cache: tuple[torch.Tensor, torch.Tensor]
    """The same as K and V for `micro_attention`."""


def wait_for(comm: Comm, copies: Sequence[Event]) -> None:
    """Wait until these copies have arrived."""
    comm.waiter.until(
        lambda: all(copy.query() for copy in copies) or None,
        "rBlocks on their way to or from the host's memory",
    )


def lay_out(
    kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, place: torch.device
) -> list[Buffer]:
    """Allocate the buffers of the device: the same memory whatever is staged."""
    pool = BlockPool(BUFFERS * PIECE_BLOCKS, 1, kv_heads, block_size, head_dim, dtype, place)
    k, v = pool.layer(0)
    return [
        Buffer(
            [pool.rblock(slot)[0] for slot in range(first, first + PIECE_BLOCKS)],
            (k[first : first + PIECE_BLOCKS], v[first : first + PIECE_BLOCKS]),
        )
        for first in range(0, BUFFERS * PIECE_BLOCKS, PIECE_BLOCKS)
    ]


class Staging:
    """Owner of the buffers. The pieces of all layers of a step follow each other through them:

        copies     0   1       2           3 …           piece n + 2 overwrites n's buffer, so its
        compute        attend 0 ─┘ attend 1 ─┘ …         copy is asked for behind attention to n

    `copy_beside` waits for all that was asked of the device before it, hence for the kernels that
    read the buffer; they wait for their copy by its event (`Device.wait_event`). When a layer's
    pieces are over, the first of the next layer come in beside what is computed between the two.

    The host sees the end of every copy before it asks for the one behind the next: it polls, so
    that it serves debtors meanwhile, and is never so far ahead that a launch would block.
    """

    def __init__(self, comm: Comm, host_pool: BlockPool, specs: Sequence[AttentionSpec]) -> None:
        """`specs`: one for each layer."""
        self._comm, self._host_pool, self._specs = comm, host_pool, specs
        _, kv_heads, size, dim = host_pool.layer(0)[0].shape
        self._free = deque(lay_out(kv_heads, size, dim, host_pool.dtype, comm.device.place))
        self._under_way: deque[tuple[Event, Buffer]] = deque()

    def begin(self, groups: Sequence[QueryGroup], tokens: Sequence[int]) -> None:
        """A step in which these groups are staged. `tokens`: the step's tokens whose queries they
        are, in order."""
        assert not self._under_way
        self._groups = groups
        (self._tokens,) = self._comm.device.upload([torch.tensor(tokens, dtype=torch.int32)])
        self._cut: dict[tuple[int, bool], list[Piece]] = {}
        layers = range(len(self._specs))
        self._ahead = ((layer, piece) for layer in layers for piece in self._pieces(layer))
        for _ in range(BUFFERS):
            self._ask()

    def post_queries(self, q: torch.Tensor) -> None:
        """Keep the rows of `q` `[tokens, heads, head_dim]` that the groups ask with."""
        self._queries = q.index_select(0, self._tokens)

    def merge(self, layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Attend to the layer's pieces, and merge the results into the rank's own, in place. Layers
        come in order."""
        for piece in self._pieces(layer):
            copied, buffer = self._under_way.popleft()
            self._comm.device.wait_event(copied)
            merge_rows(out, lse, self._tokens[piece.queries], *self._attend(layer, piece, buffer))
            self._free.append(buffer)
            wait_for(self._comm, [copied])
            self._ask()

    def _attend(
        self, layer: int, piece: Piece, buffer: Buffer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, batch, spec = self._queries[piece.queries], piece.batch, self._specs[layer]
        if spec.positional:
            batch = replace(batch)  # what kernels keep of it is on the device, for each piece
        return micro_attention(q, *buffer.cache, batch, spec, causal=False)

    def _ask(self) -> None:
        """Launch the copy of the next piece, if there is one, behind the kernels that read its
        buffer."""
        following = next(self._ahead, None)
        if following:
            layer, piece = following
            buffer = self._free.popleft()
            sources = [self._host_pool.rblock(slot)[layer] for slot in piece.slots]
            targets = buffer.rblocks[: len(sources)]
            copied = self._comm.device.copy_beside(sources, targets)
            self._under_way.append((copied, buffer))

    def _pieces(self, layer: int) -> list[Piece]:
        """The pieces of a layer; layers with equal windows share them."""
        spec = self._specs[layer]
        key = spec.window, spec.positional
        if key not in self._cut:
            size = self._host_pool.block_size
            ends = list(accumulate(sum(row.queries for row in group) for group in self._groups))
            parts = map(slice, [0, *ends[:-1]], ends)
            self._cut[key] = [
                piece
                for group, part in zip(self._groups, parts, strict=True)
                for piece in cut(group, part, spec, size)
            ]
        return self._cut[key]


def cut(group: QueryGroup, queries: slice, spec: AttentionSpec, block_size: int) -> Iterator[Piece]:
    """The rBlocks of a group that a layer's queries see, oldest first. Where positions do not
    matter, pieces of one size share their batch, so kernels plan it once."""
    behind = min(row.query_position for row in group) - spec.window
    blocks = sorted(zip(group[0].first_token, group[0].blocks, strict=True))
    seen = [(at, slot) for at, slot in blocks if not spec.window or at + block_size > behind + 1]
    batches: dict[tuple[int, ...], PagedBatch] = {}
    for start in range(0, len(seen), PIECE_BLOCKS):
        part = seen[start : start + PIECE_BLOCKS]
        kv_len = len(part) * block_size
        first_token = tuple(at for at, _ in part)
        if not spec.positional:
            first_token = tuple(range(0, kv_len, block_size))
        if first_token not in batches:
            slots = range(len(part))
            batches[first_token] = PagedBatch.build(
                [
                    PagedRow(row.queries, row.query_position, slots, first_token, kv_len)
                    for row in group
                ]
            )
        yield Piece(queries, [slot for _, slot in part], batches[first_token])
