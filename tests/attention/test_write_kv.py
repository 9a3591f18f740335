from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_distkv.attention import write_kv


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 7, 60]),
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from([4, 64, 80]),
    block_size=st.sampled_from([1, 16, 60]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_tokens_land_in_their_slots_and_nowhere_else(
    kernel, seed, tokens, kv_heads, dim, block_size, dtype
):
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(64, 3, 2, kv_heads, block_size, dim, generator=generator).to(dtype)
    fused = torch.randn(tokens, 3, kv_heads, dim, generator=generator).to(dtype)
    slots = torch.randperm(64 * block_size, generator=generator)[:tokens].tolist()
    want = pool.clone()
    for token, slot in enumerate(slots):
        block, offset = divmod(slot, block_size)
        for which in (0, 1):
            for head in range(kv_heads):
                want[block, 2, which, head, offset] = fused[token, 1 + which, head]
    blocks, offsets = [s // block_size for s in slots], [s % block_size for s in slots]
    write_kv(fused[:, 1], fused[:, 2], pool[:, 2, 0], pool[:, 2, 1], int32(blocks), int32(offsets))
    assert torch.equal(pool, want)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("block", "offset"), [(4, 0), (-1, 0), (0, 8), (0, -1)])
def test_slots_out_of_range_are_refused_before_anything_is_written(block, offset):
    cache, k = torch.zeros(2, 4, 2, 8, 16), torch.ones(2, 2, 16)
    with pytest.raises(ValueError, match=r"blocks must lie in \[0, 4\) and offsets in \[0, 8\)"):
        write_kv(k, k, cache[0], cache[1], int32([1, block]), int32([1, offset]))
    assert (cache == 0).all()


def test_what_does_not_fit_is_refused():
    cache, k, slots = torch.zeros(4, 2, 8, 16), torch.ones(2, 2, 16), int32([0, 1])
    with pytest.raises(ValueError, match="does not fit a cache"):
        write_kv(k[:, :1], k[:, :1], cache, cache, slots, slots)
    with pytest.raises(ValueError, match="do not fit a cache of"):
        write_kv(k.half(), k.half(), cache, cache, slots, slots)
    with pytest.raises(ValueError, match="int32"):
        write_kv(k, k, cache, cache, slots.long(), slots)
    with pytest.raises(ValueError, match="contiguous"):
        write_kv(k.mT.contiguous().mT, k, cache, cache, slots, slots)
