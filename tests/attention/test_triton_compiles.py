"""The kernels compile for GPUs, which takes none: the interpreter does not look at types, nor at
how much memory a program takes."""

from __future__ import annotations

import pytest

from hpc_distkv.attention.triton import backend, tuning

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backend.interpreted(), reason="needs the compiler")

H100 = tuning.Processors(132, 232_448)
INTS = ("items", "blocks", "offsets", "first_token", "merges", "rows")
FLOATS = ("out", "lse", "part_out", "part_lse", "slopes")


def compiled(name: str, dtype: str, constants: dict, warps: int = 4, stages: int = 3, arch=90):
    """What Triton makes of a kernel for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hpc_distkv.attention.triton import kernels as triton_kernels

    function = getattr(triton_kernels, name)
    scalars = {"scale": "fp32", "softcap": "fp32", "window": "i32"}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in scalars or argument.endswith(("_stride", "_from")):
            return scalars.get(argument, "i32")
        return "*" + ("i32" if argument in INTS else "fp32" if argument in FLOATS else dtype)

    signature = {argument: kind(argument) for argument in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(signature)
        if signature[argument] != "constexpr" and argument not in ("scale", "softcap", "window")
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("heads", [32, 0])
def test_rotation_and_cache_write(dtype, heads):
    sizes = {"HEADS": heads, "KV_HEADS": 8, "DIM": 128, "WIDTH": 128, "ROTARY": 4 * heads}
    made = compiled("rotate_and_write", dtype, sizes | {"BLOCK_SIZE": 32, "TILE": 8})
    assert ".target sm_90" in made.asm["ptx"]


def test_merges():
    sizes = {"HEADS": 32, "DIM": 128, "WIDTH": 128}
    for name, size in (("merge_rows", {"TILE": 8}), ("combine", {"PARTS": 32})):
        assert ".target sm_90" in compiled(name, "fp32", sizes | size).asm["ptx"]


@pytest.mark.parametrize(
    ("choose", "dim", "arch"),
    [
        (tuning.decode_kernel, 64, 90),
        (tuning.decode_kernel, 128, 90),
        (tuning.prefill_kernel, 128, 90),
        (tuning.decode_kernel, 64, 80),
        (tuning.decode_kernel, 64, 100),
        (tuning.prefill_kernel, 128, 100),
    ],
)
def test_attention_takes_no_more_shared_memory_than_it_is_chosen_by(choose, dim, arch):
    shape = tuning.Shape(4, 8, dim, 2)
    kernel = choose(shape, H100)
    sizes = {"KV_HEADS": 8, "GROUP": 4, "DIM": dim, "WIDTH": shape.width, "BLOCK_SIZE": 32}
    tile = {"LINES": kernel.lines, "KEYS": kernel.keys, "POSITIONS": True, "CAUSAL": True}
    masks = {"WINDOW": False, "SOFTCAP": False, "SLOPES": False, "PRECISION": "tf32"}
    made = compiled("attend", "bf16", sizes | tile | masks, kernel.warps, kernel.stages, arch)
    assert made.metadata.shared <= kernel.shared_memory(shape)
