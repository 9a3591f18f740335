"""What the Triton kernels must do. `test_attention_triton.py` runs this under Triton's interpreter;
on a machine with a GPU it is run on that: `pytest tests/attention/triton_cases.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_oracle import DTYPES, Case, assert_close, cases, check_turn, dense, random_case
from hypothesis import HealthCheck, given, settings
from test_attention_merge import parts_of

from hpc_distkv.attention import (
    AttentionSpec,
    PagedBatch,
    PagedRow,
    merge_rows,
    rotate_and_write,
)
from hpc_distkv.attention import micro_attention as attention
from hpc_distkv.attention.triton import backend, launch_plan, tuning

DEVICE = torch.device("cpu" if backend.interpreted() else "cuda")
ROUNDED = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Weights are rounded to the type of V before they are multiplied; log-sum-exps are not."""


@pytest.fixture(autouse=True, scope="module")
def interpreter_knows_bfloat16():
    """It multiplies the bits of bfloat16 as if they were integers."""
    if DEVICE.type == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return multiply(self, widened(a), widened(b), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(params=["whole", "cut"])
def cut(request, monkeypatch):
    """Without and with rows whose keys are cut into parts of 64."""
    monkeypatch.setattr(tuning, "chunk", lambda *_: 64 if request.param == "cut" else 1_000_000_000)


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    q, k_cache, v_cache = (t.to(DEVICE) for t in (case.q, case.k_cache, case.v_cache))
    out = torch.full(q.shape, torch.nan, device=DEVICE)
    lse = torch.full(q.shape[:2], torch.nan, device=DEVICE)
    attention(q, k_cache, v_cache, case.batch, case.spec, causal=case.causal, out=out, lse=lse)
    return out.cpu(), lse.cpu()


def check(case: Case, tol: float = 2e-5) -> None:
    out, lse = run(case)
    want_out, want_lse = dense(case)
    assert_close((out,), (want_out,), max(tol, ROUNDED[case.q.dtype]))
    assert_close((lse,), (want_lse,), tol)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_equals_dense_softmax_in_float64(case):
    check(case, 2e-5 if case.spec.slopes is None else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.usefixtures("cut")
def test_decode_of_ragged_rows(dim, dtype):
    check(random_case(1, shapes=[(1, 200), (1, 3), (1, 0), (1, 64)], group=4, dim=dim, dtype=dtype))


@pytest.mark.parametrize(
    ("block_size", "dtype"), list(zip([24, 16, 128], DTYPES, strict=True)), ids=str
)
@pytest.mark.usefixtures("cut")
def test_chunks_of_a_prompt_beside_decodes(block_size, dtype):
    sizes = {"group": 7, "kv_heads": 1, "dim": 64, "holes": False, "block_size": block_size}
    check(random_case(2, shapes=[(20, 150), (1, 90), (3, 3)], dtype=dtype, **sizes))


@pytest.mark.parametrize(
    "options",
    [{"window": 20}, {"window": 100}, {"softcap": 0.7}, {"slopes": True}],
    ids=["window", "wide window", "softcap", "slopes"],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("cut")
def test_options(options, causal):
    shapes = [(1, 200), (30, 170)]
    check(random_case(3, shapes=shapes, causal=causal, dim=16, kv_heads=1, **options), 1e-4)


@pytest.mark.usefixtures("cut")
def test_partials_of_a_row_and_its_guests_merge_to_the_whole():
    case = random_case(4, shapes=[(3, 200)], kv_heads=1)
    whole = dense(case)
    own, *guests = parts_of(case.rows[0], [i % 3 for i in range(13)], 3, 16)
    case.rows = [own]
    out, lse = (part.to(DEVICE) for part in run(case))
    rows = torch.arange(3, dtype=torch.int32)
    for guest in guests:
        case.rows = [guest]
        merge_rows(out, lse, rows, *(part.to(DEVICE) for part in run(case)))
    assert_close((out.cpu(), lse.cpu()), whole)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.usefixtures("cut")
def test_nothing_is_read_behind_the_window_or_after_the_last_token(queries):
    case = random_case(5, shapes=[(queries, 150)], holes=False, window=20, kv_heads=1)
    want = dense(case)
    row = case.rows[0]
    hidden = (row.query_position - 20 + 1) // 16
    for cache in (case.k_cache, case.v_cache):
        cache[row.blocks[:hidden]] = torch.nan
        cache[row.blocks[-1], :, 150 % 16 :] = torch.nan
    assert_close(run(case), want)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.usefixtures("cut")
def test_queries_before_every_key_have_an_empty_result(queries):
    case = random_case(6, shapes=[(queries, 40)], holes=False, kv_heads=1)
    case.rows[0] = case.rows[0]._replace(query_position=0, first_token=[100, 116, 132])
    out, lse = run(case)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.usefixtures("cut")
def test_blocks_may_be_listed_in_any_order(window):
    case = random_case(7, shapes=[(1, 96), (20, 96)], kv_heads=1, window=window)
    case.rows = [
        row._replace(blocks=row.blocks[::-1], first_token=row.first_token[::-1])
        for row in case.rows
    ]
    check(case)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("queries", [1, 30])
def test_extreme_logits(queries, sign):
    case = random_case(8, shapes=[(queries, 100)], causal=False, kv_heads=1, scale=0.5)
    steps = torch.arange(case.k_cache.shape[0] * 16).reshape(-1, 1, 16) % 7
    case.q.zero_()
    case.q[..., 0], case.q[..., 1] = 128.0 * sign, 1.0
    case.k_cache.zero_()
    case.k_cache[..., 0], case.k_cache[..., 1] = 156.0, steps.float()
    want = dense(case)
    assert want[1].abs().min() > 9_900
    got = run(case)
    # A unit in the last place of 10,000 · log2(e) is 0.001.
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got[1].double(), want[1], rtol=3e-7, atol=1e-3)


def test_queries_may_be_a_view_of_a_fused_projection():
    case = random_case(9, shapes=[(1, 40), (5, 60)])
    fused = torch.zeros(6, 3, 4, 32)
    fused[:, 1] = case.q
    case.q = fused[:, 1]
    check(case)


def test_no_rows_and_no_queries():
    check(random_case(10, shapes=[]))
    check(random_case(10, shapes=[(0, 30), (1, 20), (0, 0)]))


def test_what_a_batch_needs_on_the_device_is_copied_once_for_all_layers(monkeypatch):
    case = random_case(11, shapes=[(1, 40), (5, 60)])
    copies = []
    copy = launch_plan.upload
    monkeypatch.setattr(launch_plan, "upload", lambda *args: copies.append(args) or copy(*args))
    batch = case.batch
    q, k_cache, v_cache = (t.to(DEVICE) for t in (case.q, case.k_cache, case.v_cache))
    for _ in range(3):
        got = attention(q, k_cache, v_cache, batch, case.spec, causal=True)
    assert len(copies) == 1
    assert_close(tuple(t.cpu() for t in got), dense(case))


def test_a_batch_that_does_not_fit_is_refused():
    case = random_case(12, shapes=[(1, 40)])
    case.rows.append(PagedRow(0, 0, [999], [0], 3))
    with pytest.raises(ValueError, match=r"blocks must lie in \[0"):
        run(case)


@pytest.mark.parametrize("index_device", {torch.device("cpu"), DEVICE}, ids=str)
def test_merge_rows_touches_only_the_named_rows(index_device):
    generator = torch.Generator().manual_seed(0)
    out, part_out = torch.randn(6, 5, 20, generator=generator), torch.randn(3, 5, 20)
    lse, part_lse = torch.randn(6, 5, generator=generator) * 5, torch.randn(3, 5) * 5
    lse[4], part_lse[1], part_lse[2, 2:] = 1e4, -torch.inf, -torch.inf
    lse[2], out[2] = -torch.inf, 0
    part_out[1], part_out[2, 2:] = 0, 0
    rows = [4, 0, 2]
    both = torch.stack((lse[rows], part_lse)).double()
    want_out, want_lse = out.double(), lse.double()
    want_lse[rows] = both.logsumexp(0)
    shares = (both - want_lse[rows].clamp(min=-1e9)).exp()[..., None]
    want_out[rows] = shares[0] * out[rows] + shares[1] * part_out
    out, lse, part_out, part_lse = (t.to(DEVICE) for t in (out, lse, part_out, part_lse))
    index = torch.tensor(rows, dtype=torch.int32).to(index_device)
    merge_rows(out, lse, index, part_out, part_lse)
    assert_close((out.cpu(), lse.cpu()), (want_out, want_lse), 2e-6)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 6\)"):
        merge_rows(out, lse, torch.tensor([0, 6, 1], dtype=torch.int32), part_out, part_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 64), (7, 3, 80), (3, 1, 4)])
def test_tokens_land_in_their_slots_and_nowhere_else(tokens, heads, dim, dtype):
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(8, 3, 2, heads, 16, dim, generator=generator).to(dtype)
    fused = torch.randn(tokens, 3, heads, dim, generator=generator).to(dtype)
    blocks = torch.randint(0, 8, (tokens,), generator=generator, dtype=torch.int32)
    offsets = torch.randperm(16, generator=generator)[:tokens].int()
    want = pool.clone()
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        want[block, 2, :, :, offset] = fused[token, 1:]
    on, new = pool.to(DEVICE), fused.to(DEVICE)
    qk = new[:, :2].flatten(1, 2)
    q = rotate_and_write(qk, new[:, 2], None, on[:, 2, 0], on[:, 2, 1], blocks, offsets)
    assert torch.equal(q, new[:, 0])
    assert torch.equal(on.cpu(), want)


def test_slots_out_of_range_are_refused_before_anything_is_written():
    cache, k = torch.zeros(2, 4, 2, 8, 16, device=DEVICE), torch.ones(2, 2, 16, device=DEVICE)
    blocks, offsets = (torch.tensor([1, at], dtype=torch.int32) for at in (4, 0))
    with pytest.raises(ValueError, match=r"blocks must lie in \[0, 4\) and offsets in \[0, 8\)"):
        rotate_and_write(k, k, None, cache[0], cache[1], blocks, offsets)
    assert (cache == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (80, 32)])
def test_queries_and_keys_turn_as_complex_numbers_and_values_stay(dim, rotary, dtype):
    check_turn(rotary, dim, dtype, DEVICE)


def decodes(lengths: list[int], seed: int) -> PagedBatch:
    """A row of one query for each length, with rBlocks of 16 tokens."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for length in lengths:
        blocks = [order.pop() for _ in range(-(-length // 16))]
        first = range(0, 16 * len(blocks), 16)
        rows.append(PagedRow(1, max(length - 1, 0), blocks, first, length))
    return PagedBatch.build(rows)


@pytest.mark.usefixtures("cut")
def test_a_roomy_plan_serves_every_batch_of_its_form():
    """Also one with fewer items than the last, whose rows then are not computed again."""
    generator = torch.Generator().manual_seed(0)
    q, k_cache, v_cache = (
        torch.randn(shape, generator=generator).to(DEVICE)
        for shape in ((4, 4, 32), (40, 2, 16, 32), (40, 2, 16, 32))
    )
    kernels, spec = backend.kernels(DEVICE), AttentionSpec(scale=0.2)
    batches = [decodes([200, 130, 70, 1], 1), decodes([140, 150, 90, 0], 2)]
    plans = [kernels.plan(q, k_cache, batch, spec, causal=True) for batch in batches]
    assert plans[0].form == plans[1].form
    roomy, any_batch = plans[0].roomy(), decodes([0] * 4, 0)
    any_batch.remember(launch_plan.plan_key(q, k_cache, spec, causal=True), roomy)
    for batch, plan in [*zip(batches, plans, strict=True), (batches[0], plans[0])]:
        roomy.take(plan)
        out, lse = attention(q, k_cache, v_cache, any_batch, spec, causal=True)
        wanted_out, wanted_lse = attention(q, k_cache, v_cache, batch, spec, causal=True)
        assert torch.equal(out, wanted_out)
        assert torch.equal(lse, wanted_lse)
