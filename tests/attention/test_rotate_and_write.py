from __future__ import annotations

import pytest
import torch
from attention_oracle import check_turn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_distkv.attention import Rotation, rotate_and_write


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
    qk, slots = fused[:, :2].flatten(1, 2), (int32(blocks), int32(offsets))
    q = rotate_and_write(qk, fused[:, 2], None, pool[:, 2, 0], pool[:, 2, 1], *slots)
    assert torch.equal(q, fused[:, 0])
    assert torch.equal(pool, want)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("block", "offset"), [(4, 0), (-1, 0), (0, 8), (0, -1)])
def test_slots_out_of_range_are_refused_before_anything_is_written(block, offset):
    cache, k = torch.zeros(2, 4, 2, 8, 16), torch.ones(2, 2, 16)
    with pytest.raises(ValueError, match=r"blocks must lie in \[0, 4\) and offsets in \[0, 8\)"):
        rotate_and_write(k, k, None, cache[0], cache[1], int32([1, block]), int32([1, offset]))
    assert (cache == 0).all()


def test_what_does_not_fit_is_refused():
    cache, k, slots = torch.zeros(4, 2, 8, 16), torch.ones(2, 2, 16), int32([0, 1])
    table = torch.ones(2, 1, 16)
    for match, qk, v, rotation, blocks in (
        ("does not fit a cache", k[:, :1], k[:, :1], None, slots),
        ("not of the same tokens", k[:, :1], k, None, slots),
        ("not of the same tokens", k[:1], k, None, slots),
        ("do not fit a cache of", k.half(), k.half(), None, slots),
        ("int32", k, k, None, slots.long()),
        ("contiguous", k.mT.contiguous().mT, k, None, slots),
        ("does not fit qk", k, k, Rotation(table[:1], table), slots),
        ("does not fit qk", k, k, Rotation(table, table.half()), slots),
        ("does not fit qk", k, k, Rotation(table.repeat(1, 1, 2), table), slots),
    ):
        with pytest.raises(ValueError, match=match):
            rotate_and_write(qk, v, rotation, cache, cache, blocks, slots)
    assert (cache == 0).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rotary", [16, 6])
def test_queries_and_keys_turn_as_complex_numbers_and_values_stay(rotary):
    check_turn(rotary, 16, torch.float32, torch.device("cpu"))
