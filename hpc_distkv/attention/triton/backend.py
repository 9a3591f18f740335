"""The Triton backend: what it serves, and its launches.

Nothing here waits for a device. What depends on a batch alone is worked out on the host and copied
once, at the batch's first call; later calls of the same batch (the other layers) only launch.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from hpc_distkv.attention.paged import Call, PagedBatch
from hpc_distkv.attention.reference import Rotation
from hpc_distkv.attention.spec import AttentionSpec
from hpc_distkv.attention.triton import tuning
from hpc_distkv.attention.triton.launch_plan import LaunchPlan, plan_key
from hpc_distkv.attention.triton.launcher import Launcher
from hpc_distkv.attention.triton.tuning import Processors, Shape

log = logging.getLogger(__name__)

_TILE = 1024
"""Numbers that a program of the copying kernels takes."""


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(device: torch.device) -> TritonKernels | None:
    """The kernels for tensors on `device`; None for the CPU, unless Triton is interpreted, and
    where there is no Triton that can compile (one warning says so)."""
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return _kernels(device)
    return None


@functools.cache
def _kernels(device: torch.device) -> TritonKernels | None:
    try:
        from hpc_distkv.attention.triton import kernels as triton_kernels

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
    return TritonKernels(triton_kernels, _processors(device))


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


class TritonKernels:
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
        return spec.scale > 0 and tuning.fits(Shape.of(q, k_cache), self._processors)

    def plan(
        self, q: Tensor, k_cache: Tensor, batch: PagedBatch, spec: AttentionSpec, *, causal: bool
    ) -> LaunchPlan:
        """What `micro_attention` launches for this batch, worked out at the first call, if the
        batch does not know it by `plan_key`. Of `q` only the shape matters."""
        return batch.derived(
            plan_key(q, k_cache, spec, causal=causal),
            lambda: LaunchPlan.of(q, k_cache, batch, spec, self._processors, causal=causal),
        )

    def micro_attention(self, call: Call) -> None:
        """Raises ValueError where the batch's numbers do not fit the tensors."""
        q, k_cache, v_cache, batch, spec, causal, out, lse = call
        shape = Shape.of(q, k_cache)
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
