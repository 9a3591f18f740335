from __future__ import annotations

import pytest
import torch
from attention_oracle import assert_close, dense, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_distkv.attention import PagedBatch, PagedRow, merge_rows, micro_attention

SETTINGS = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def parts_of(row: PagedRow, owners: list[int], count: int, block_size: int) -> list[PagedRow]:
    """The row's rBlocks dealt out to `count` owners; only the last one's list may end unsealed."""
    parts = []
    for owner in range(count):
        mine = [i for i, o in enumerate(owners) if o == owner]
        tokens = sum(min(block_size, row.kv_len - i * block_size) for i in mine)
        blocks, first = [row.blocks[i] for i in mine], [row.first_token[i] for i in mine]
        parts.append(row._replace(blocks=blocks, first_token=first, kv_len=tokens))
    return parts


@SETTINGS
@given(
    seed=st.integers(0, 2**31),
    queries=st.sampled_from([1, 3, 30]),
    tokens=st.integers(1, 300),
    count=st.integers(1, 5),
    owners=st.lists(st.integers(0, 4), min_size=20, max_size=20),
)
def test_partials_of_any_partition_merge_to_the_whole(kernel, seed, queries, tokens, count, owners):
    case = random_case(seed, shapes=[(queries, tokens)])
    owners = [owner % count for owner in owners[: len(case.rows[0].blocks)]]
    partials = []
    for part in parts_of(case.rows[0], owners, count, 16):
        batch = PagedBatch.build([part])
        result = micro_attention(case.q, case.k_cache, case.v_cache, batch, case.spec, causal=True)
        partials.append(result)
    want = dense(case)
    assert_close(folded(partials), want)
    assert_close(folded(partials[::-1]), want)
    nested = [partials[0], folded(partials[1:])] if count > 1 else partials
    assert_close(folded(nested), want)


def folded(partials: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All merged into the first one's copy."""
    out, lse = partials[0][0].clone(), partials[0][1].clone()
    for part in partials[1:]:
        merge_rows(out, lse, torch.arange(len(out), dtype=torch.int32), *part)
    return out, lse


def merged(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle, in float64."""
    every_out, every_lse = torch.stack(outs).double(), torch.stack(lses).double()
    total = every_lse.logsumexp(0)
    weights = (every_lse - total).exp().nan_to_num()
    return (weights[..., None] * every_out).sum(0), total


def partial(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(n, 3, 20, generator=generator)
    return out, torch.randn(n, 3, generator=generator) * 5


def test_empty_partials_change_nothing(kernel):
    out, lse = partial(4, 0)
    empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for outs, lses in (((out, empty[0]), (lse, empty[1])), ((empty[0], out), (empty[1], lse))):
        assert_close(folded([*zip(outs, lses, strict=True)]), (out, lse), 1e-6)
    both = folded([empty, empty])
    assert (both[0] == 0).all()
    assert (both[1] == -torch.inf).all()


def test_merge_rows_touches_only_the_named_rows(kernel):
    out, lse = partial(6, 1)
    part_out, part_lse = partial(3, 2)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    want_out, want_lse = out.clone(), lse.clone()
    for index, row in enumerate(rows.tolist()):
        mine, theirs = slice(row, row + 1), slice(index, index + 1)
        both = merged([out[mine], part_out[theirs]], [lse[mine], part_lse[theirs]])
        want_out[mine], want_lse[mine] = both
    untouched = out[[1, 3, 5]].clone()
    merge_rows(out, lse, rows, part_out, part_lse)
    assert_close((out, lse), (want_out, want_lse), 1e-6)
    assert torch.equal(out[[1, 3, 5]], untouched)


def test_merge_rows_with_empty_sides(kernel):
    out, lse = partial(4, 3)
    out[:2], lse[:2] = 0, -torch.inf
    part_out, part_lse = partial(4, 4)
    part_out[1::2], part_lse[1::2] = 0, -torch.inf
    want = out.clone(), lse.clone()
    want[0][0], want[1][0] = part_out[0], part_lse[0]
    both = merged([out[2:3], part_out[2:3]], [lse[2:3], part_lse[2:3]])
    want[0][2:3], want[1][2:3] = both
    merge_rows(out, lse, torch.arange(4, dtype=torch.int32), part_out, part_lse)
    assert_close((out, lse), want, 1e-6)


def test_merge_rows_at_extreme_statistics(kernel):
    out, _ = partial(2, 5)
    lse = torch.tensor([[1e4] * 3, [-1e4] * 3])
    part_out, _ = partial(2, 6)
    merge_rows(out, lse, torch.tensor([0, 1], dtype=torch.int32), part_out, -lse.clone())
    assert (lse == 1e4).all()
    assert torch.equal(out[1], part_out[1])


@pytest.mark.parametrize("rows", [[0, 6], [-1, 0]])
def test_merge_rows_refuses_rows_out_of_range(compiled, rows):
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 6\)"):
        merge_rows(*partial(6, 7), torch.tensor(rows, dtype=torch.int32), *partial(2, 8))


def test_merge_rows_refuses_what_does_not_fit():
    out, lse = partial(2, 9)
    with pytest.raises(ValueError, match="do not fit"):
        merge_rows(out, lse, torch.zeros(1, dtype=torch.int32), out, lse)
    with pytest.raises(ValueError, match="int32"):
        merge_rows(out, lse, torch.arange(2), out, lse)
