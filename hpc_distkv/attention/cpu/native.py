"""Builds, loads and calls the C kernels (`kernels.c`).

The library is compiled at first use with the system's compiler for the machine it runs on, and
kept in the user's cache (`kernel_cache`) under a name that holds everything it depends on. Many
ranks may start at once on unlike nodes with one home directory: each builds in a private folder,
which is removed at once, and hands the cache what it has built.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hpc_distkv.attention.cpu.kernel_cache import KernelCache, user_cache
from hpc_distkv.attention.paged import Call

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
# No -ffast-math: the loops are vectors already, it turns two fused multiply-adds into three
# operations, and with it the library would make the whole process flush denormals to zero.
COMPILE = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
LINK = ("-shared", "-fopenmp", "-lm")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BUILD_SECONDS = 120

_CALL = struct.Struct("=28q2d")  # `Call` in kernels.c
_OK, _NO_MEMORY = 0, 1


class NativeKernels:
    """The loaded library. Callers have checked dtypes, shapes and strides; numbers inside the index
    tensors are checked by the library, because a wrong one would read or write foreign memory."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._attention = library.hpc_distkv_micro_attention
        self._attention.argtypes = [ctypes.c_char_p]
        self._merge = library.hpc_distkv_merge_rows
        self._merge.argtypes = [pointer] * 5 + [integer] * 5
        self._write = library.hpc_distkv_write_kv
        self._write.argtypes = [pointer] * 6 + [integer] * 10

    def micro_attention(self, call: Call, stream_lines: int) -> None:
        """Rows of up to `stream_lines` lines are streamed. Raises ValueError where the batch does
        not fit the tensors."""
        q, k_cache, v_cache, batch, spec, causal, out, lse = call
        queries, heads, dim = q.shape
        num_blocks, kv_heads, block_size, _ = k_cache.shape
        size = q.element_size()
        packed = _CALL.pack(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            batch.query_start.data_ptr(),
            batch.query_position.data_ptr(),
            batch.block_start.data_ptr(),
            batch.blocks.data_ptr(),
            batch.first_token.data_ptr(),
            batch.kv_len.data_ptr(),
            0 if spec.slopes is None else spec.slopes.data_ptr(),
            queries,
            batch.kv_len.numel(),
            batch.blocks.numel(),
            heads,
            kv_heads,
            dim,
            num_blocks,
            block_size,
            q.stride(0) * size,
            k_cache.stride(0) * size,
            v_cache.stride(0) * size,
            DTYPES[q.dtype],
            causal,
            spec.window,
            stream_lines,
            torch.get_num_threads(),
            spec.scale,
            spec.softcap,
        )
        status = self._attention(packed)
        if status == _NO_MEMORY:
            raise MemoryError("no memory for the scratch of micro_attention")
        if status != _OK:
            batch.check(queries, num_blocks, block_size)
            raise ValueError("the batch does not fit q and the cache")

    def merge_rows(
        self, out: Tensor, lse: Tensor, rows: Tensor, part_out: Tensor, part_lse: Tensor
    ) -> None:
        """Merge in place. Raises ValueError if a row lies outside out."""
        total, heads, dim = out.shape
        status = self._merge(
            out.data_ptr(),
            lse.data_ptr(),
            rows.data_ptr(),
            part_out.data_ptr(),
            part_lse.data_ptr(),
            rows.numel(),
            total,
            heads,
            dim,
            torch.get_num_threads(),
        )
        if status != _OK:
            raise ValueError(f"rows must lie in [0, {total})")

    def write_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        blocks: Tensor,
        offsets: Tensor,
    ) -> None:
        """Copy in place. Raises ValueError if a block or an offset lies outside the cache."""
        tokens, heads, dim = k.shape
        num_blocks, _, block_size, _ = k_cache.shape
        size = k.element_size()
        status = self._write(
            k.data_ptr(),
            v.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            blocks.data_ptr(),
            offsets.data_ptr(),
            tokens,
            heads,
            dim * size,
            num_blocks,
            block_size,
            k.stride(0) * size,
            v.stride(0) * size,
            k_cache.stride(0) * size,
            v_cache.stride(0) * size,
            torch.get_num_threads(),
        )
        if status != _OK:
            raise ValueError(
                f"blocks must lie in [0, {num_blocks}) and offsets in [0, {block_size})"
            )


@functools.cache
def kernels() -> NativeKernels | None:
    """The kernels, built if need be; None where HPC_DISTKV_NO_CC is 1 or no compiler builds them
    (one warning says why). Build time: about ten seconds, once per user and kind of machine."""
    if os.environ.get("HPC_DISTKV_NO_CC") == "1":
        return None
    problems = []
    for compiler in _compilers():
        try:
            return _loaded(compiler)
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(f"{shlex.join(compiler)}: {_explain(error)}")
    log.warning(
        "no C kernels, attention on the CPU falls back to torch and is many times slower; "
        "install a C compiler with OpenMP or name one in $CC (%s)",
        "; ".join(problems),
    )
    return None


def _compilers() -> Iterator[list[str]]:
    given = os.environ.get("CC", "")
    try:
        chosen = shlex.split(given)
    except ValueError:  # a quote that does not end
        chosen = [given]
    if chosen:
        yield chosen
    for name in ("cc", "gcc"):
        if chosen != [name]:
            yield [name]


def _loaded(compiler: list[str]) -> NativeKernels:
    """The kernels as the cache has them, else built. Raises OSError and SubprocessError."""
    key = _key(compiler)
    with user_cache() as cache:
        if kernels := _kept(cache, key):
            return kernels
        with tempfile.TemporaryDirectory(
            prefix="hpc_distkv-", ignore_cleanup_errors=True
        ) as scratch:
            library = _build(compiler, Path(scratch))
            if cache:
                try:
                    cache.keep(key, library.read_bytes())
                except OSError as error:  # a full disk, or one that cannot be written
                    log.info("compiled kernels are not kept: %s", error)
            return _kept(cache, key) or NativeKernels(library)


def _kept(cache: KernelCache | None, key: str) -> NativeKernels | None:
    """What the cache has, if it can be loaded: from some disks nothing can be."""
    try:
        path = cache.find(key) if cache else None
        return NativeKernels(path) if path else None
    except OSError as error:
        log.info("compiled kernels are not taken from the cache: %s", error)
        return None


def _key(compiler: list[str]) -> str:
    """A name for all that the library depends on."""
    version = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, timeout=BUILD_SECONDS
    ).stdout
    identity = [SOURCE.read_bytes(), repr((compiler, COMPILE, LINK)).encode(), version, _cpu()]
    return hashlib.sha256(b"\0".join(identity)).hexdigest()[:32]


def _build(compiler: list[str], scratch: Path) -> Path:
    compiled, linked = scratch / "kernels.o", scratch / "kernels.so"
    for command in (
        [*compiler, *COMPILE, "-c", str(SOURCE), "-o", str(compiled)],
        [*compiler, str(compiled), *LINK, "-o", str(linked)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
    return linked


def _cpu() -> bytes:
    """What -march=native depends on: two unlike machines must not share a library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    keys = ("flags", "Features", "model name", "CPU implementer", "CPU part", "cpu\t")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)})).encode()


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return lines[0] if lines else f"exit status {error.returncode}"
    return str(error)
