"""The Triton backend: what it serves, and its launches.

Nothing here waits for a device. What depends on a batch alone is worked out on the host and copied
once, at the batch's first call; later calls of the same batch (the other layers) only launch.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_distkv.attention import tuning
from hpc_distkv.attention.call import Call
from hpc_distkv.attention.paged import PagedBatch
from hpc_distkv.attention.rotation import Rotation
from hpc_distkv.attention.spec import AttentionSpec
from hpc_distkv.attention.tuning import Kernel, Processors, Shape
from hpc_distkv.attention.worklist import ITEM_SIZE, MERGE_SIZE, Ints, KeyIndex
from hpc_distkv.comm.upload import upload

log = logging.getLogger(__name__)

_TILE = 1024
"""Numbers that a program of the copying kernels takes."""


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(device: torch.device) -> Kernels | None:
    """The kernels for tensors on `device`; None for the CPU, unless Triton is interpreted, and
    where there is no Triton that can compile (one warning says so)."""
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return _kernels(device)
    return None


@functools.cache
def _kernels(device: torch.device) -> Kernels | None:
    try:
        from hpc_distkv.attention import triton_kernels

        if device.type == "cuda":
            _reach_gpu()
    except Exception as error:  # of many kinds, where it finds no compiler, headers or libcuda
        log.warning(
            "no Triton kernels, attention on the GPU falls back to torch and is many times slower; "
            "install the triton that belongs to torch %s, a C compiler and Python's headers (%s)",
            torch.__version__,
            error,
        )
        return None
    return Kernels(triton_kernels, _processors(device))


def _reach_gpu() -> None:
    """Have Triton build what it launches by: with the machine's C compiler, once."""
    from triton.runtime import driver

    driver.active.get_current_target()


def _processors(device: torch.device) -> Processors:
    if device.type != "cuda":
        return Processors(4, 96 * 1024)
    found = torch.cuda.get_device_properties(device)
    shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Processors(found.multi_processor_count, shared)


@dataclass(frozen=True)
class Launch:
    """One launch of the attention kernel."""

    kernel: Kernel
    items: Tensor
    programs: int
    positions: bool
    """Whether masks need the positions of keys."""


@dataclass(frozen=True)
class Plan:
    """The launches of a batch, with what they read on the device."""

    launches: list[Launch]
    blocks: Tensor
    first_token: Tensor
    merges: Tensor
    split: int
    """Queries whose keys were split."""
    partials: int
    most_parts: int

    @property
    def form(self) -> Hashable:
        """What its launches depend on, numbers on the device aside: plans of one form can take each
        other's numbers."""
        launches = [(at.kernel, _room(_items(at)), at.positions) for at in self.launches]
        sizes = len(self.blocks), self.split, self.partials, self.most_parts
        return (*launches, *map(_room, sizes))

    def roomy(self) -> Plan:
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
        return Plan(
            launches,
            room(self.blocks, len(self.blocks)),
            room(self.first_token, len(self.first_token)),
            room(self.merges, self.split, MERGE_SIZE),
            _room(self.split),
            _room(self.partials),
            _room(self.most_parts),
        )

    def take(self, other: Plan) -> None:
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
    shape = _shape(q, k_cache)
    return q.device, shape, causal, spec.window, len(q), len(k_cache), k_cache.shape[2]


class Launcher:
    """One Triton function. What Triton compiled for arguments of a kind is kept here and launched
    directly, which spares the host 4 µs of Triton's own look-up for a small kernel and 14 µs of 45
    for `attend`."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Tensor | int | float],
        constants: Sequence[object],
        warps: int = 4,
        stages: int = 3,
    ) -> None:
        """Launch with the function's parameters in order, `constants` last."""
        key = (warps, stages, *constants, *map(_kind, arguments))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants)
            return
        launched = self._function[grid](*arguments, *constants, num_warps=warps, num_stages=stages)
        if launched is not None:  # it is compiled, not interpreted
            self._compiled[key] = launched


def _kind(argument: Tensor | int | float) -> object:
    """All that Triton's code depends on: of numbers, whether they are 1, and multiples of 16."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >> 31 == 0
    return None


class Kernels:
    """The kernels on one device. Callers have checked dtypes, shapes and strides."""

    def __init__(self, module: ModuleType, processors: Processors) -> None:
        self._attend = Launcher(module.attend)
        self._combine = Launcher(module.combine)
        self._merge_rows = Launcher(module.merge_rows)
        self._rotate_and_write = Launcher(module.rotate_and_write)
        self._processors = processors

    def serves(self, q: Tensor, k_cache: Tensor, spec: AttentionSpec) -> bool:
        """Whether `micro_attention` takes this call: head dimensions up to 256, up to 128 query
        heads per KV head, and scales above 0."""
        return spec.scale > 0 and tuning.fits(_shape(q, k_cache), self._processors)

    def plan(
        self, q: Tensor, k_cache: Tensor, batch: PagedBatch, spec: AttentionSpec, *, causal: bool
    ) -> Plan:
        """What `micro_attention` launches for this batch, worked out at the first call, if the
        batch does not know it by `plan_key`. Of `q` only the shape matters."""
        return batch.derived(
            plan_key(q, k_cache, spec, causal=causal),
            lambda: self._plan(batch, _shape(q, k_cache), causal, spec.window, q, k_cache),
        )

    def micro_attention(self, call: Call) -> None:
        """Raises ValueError where the batch's numbers do not fit the tensors."""
        q, k_cache, v_cache, batch, spec, causal, out, lse = call
        shape = _shape(q, k_cache)
        plan = self.plan(q, k_cache, batch, spec, causal=causal)
        part_out, part_lse = out, lse
        if plan.split:
            part_out = out.new_empty((plan.partials, *out.shape[1:]))
            part_lse = lse.new_empty((plan.partials, *lse.shape[1:]))
        slopes = spec.slopes_on(q.device)
        for launch in plan.launches:
            kernel = launch.kernel
            self._attend(
                (launch.programs, 1, 1),
                (
                    *(q, k_cache, v_cache, out, lse, part_out, part_lse),
                    *(launch.items, plan.blocks, plan.first_token),
                    lse if slopes is None else slopes,
                    *(q.stride(0), k_cache.stride(0), v_cache.stride(0)),
                    *(float(spec.scale), float(spec.softcap), spec.window),
                ),
                (
                    *(shape.kv_heads, shape.group, shape.dim, shape.width, k_cache.shape[2]),
                    *(kernel.lines, kernel.keys, launch.positions, causal and launch.positions),
                    *(spec.window > 0, spec.softcap > 0, slopes is not None),
                    "ieee" if q.dtype == torch.float32 else "tf32",
                ),
                kernel.warps,
                kernel.stages,
            )
        if plan.split:
            parts = tuning.combined_parts(plan.most_parts, shape)
            self._combine(
                (plan.split, q.shape[1], 1),
                (part_out, part_lse, out, lse, plan.merges),
                (q.shape[1], shape.dim, shape.width, parts),
                warps=2,
            )

    def merge_rows(
        self, out: Tensor, lse: Tensor, rows: Tensor, part_out: Tensor, part_lse: Tensor
    ) -> None:
        """Merge in place; `rows` on the device of the others."""
        parts, heads, dim = part_out.shape
        width = tuning.power_of_two(dim)
        tile = min(max(_TILE // width, 1), tuning.power_of_two(heads))
        if parts:
            self._merge_rows(
                (parts, -(-heads // tile), 1),
                (out, lse, rows, part_out, part_lse),
                (heads, dim, width, tile),
            )

    def rotate_and_write(
        self,
        qk: Tensor,
        v: Tensor,
        rotation: Rotation | None,
        k_cache: Tensor,
        v_cache: Tensor,
        blocks: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """As `cache.rotate_and_write`; `blocks` and `offsets` on the device of the others."""
        tokens, kv_heads, dim = v.shape
        heads = qk.shape[1] - kv_heads
        q = qk[:, :heads]
        if rotation is None:
            qk, heads = qk[:, heads:], 0
            turned, (cos, sin), rotary = qk, (qk, qk), 0
        else:
            q = turned = torch.empty((tokens, heads, dim), dtype=qk.dtype, device=qk.device)
            (cos, sin), rotary = rotation, rotation.cos.shape[-1]
        width = tuning.power_of_two(dim)
        every = heads + 2 * kv_heads
        tile = min(max(_TILE // width, 1), tuning.power_of_two(every))
        strides = qk.stride(0), v.stride(0), cos.stride(0), k_cache.stride(0), v_cache.stride(0)
        if tokens:
            self._rotate_and_write(
                (tokens, -(-every // tile), 1),
                (qk, v, turned, k_cache, v_cache, cos, sin, blocks, offsets, *strides),
                (heads, kv_heads, dim, width, rotary, k_cache.shape[2], tile),
            )
        return q

    def _plan(
        self,
        batch: PagedBatch,
        shape: Shape,
        causal: bool,
        window: int,
        q: Tensor,
        k_cache: Tensor,
    ) -> Plan:
        num_blocks, _, block_size, _ = k_cache.shape
        batch.check(len(q), num_blocks, block_size)
        index = KeyIndex(batch, block_size)
        few = tuning.decode_kernel(shape, self._processors)
        many = tuning.prefill_kernel(shape, self._processors)
        is_few = index.counts * shape.group <= few.lines
        partials, launches, merges = 0, [], [np.empty((0, 4), np.int64)]
        for kernel, chosen in ((few, is_few), (many, ~is_few)):
            rows = np.flatnonzero(chosen & (index.counts > 0))
            if not rows.size:
                continue
            tiles = index.tiles(rows, kernel.lines // shape.group, causal=causal, window=window)
            chunk = tuning.chunk(tiles.lengths, shape.kv_heads, kernel, self._processors)
            items, merge, partials = tiles.cut(chunk, kernel.keys, partials)
            launches.append((kernel, items, not tiles.exact))
            merges.append(merge)
        merge = np.concatenate(merges)
        lists = [_flat(numbers) for numbers in (merge, *(items for _, items, _ in launches))]
        blocks, first_token, on_device, *items_on_device = upload(
            [batch.blocks, batch.first_token, *lists], q.device
        )
        return Plan(
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


def _flat(numbers: Ints) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32).reshape(-1))


def _items(launch: Launch) -> int:
    return launch.items.numel() // ITEM_SIZE


def _room(size: int) -> int:
    return tuning.power_of_two(size) if size else 0


def _shape(q: Tensor, k_cache: Tensor) -> Shape:
    _, kv_heads, _, dim = k_cache.shape
    return Shape(q.shape[1] // kv_heads, kv_heads, dim, q.element_size())
