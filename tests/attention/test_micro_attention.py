from __future__ import annotations

import pytest
import torch
from attention_oracle import DTYPES, Case, assert_close, cases, dense, random_case
from hypothesis import HealthCheck, given, settings

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, micro_attention


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return micro_attention(
        case.q, case.k_cache, case.v_cache, case.batch, case.spec, causal=case.causal
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_equals_dense_softmax_in_float64(kernel, case):
    # float32 scores of -100 or less, as slopes make them, have an error of 1e-5.
    assert_close(run(case), dense(case), 2e-5 if case.spec.slopes is None else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3000), (50, 3000)], ids=["decode", "prefill"])
def test_long_rows_equal_dense_softmax(kernel, shape, dtype):
    case = random_case(1, shapes=[shape, (1, 7)], dtype=dtype, group=3, kv_heads=1, holes=False)
    assert_close(run(case), dense(case))


def test_a_split_prefill_row_equals_dense_softmax(kernel):
    case = random_case(2, shapes=[(20, 20_000)], group=1, kv_heads=1, dim=16, block_size=64)
    assert_close(run(case), dense(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3000), (130, 3000)], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "options",
    [{"window": 100}, {"window": 2000}, {"softcap": 0.7}, {"slopes": True}],
    ids=["window", "wide window", "softcap", "slopes"],
)
def test_options_over_long_rows_equal_dense_softmax(kernel, options, shape, dtype):
    sizes = {"group": 3, "kv_heads": 1, "holes": False}
    case = random_case(14, shapes=[shape, (1, 7)], dtype=dtype, **sizes, **options)
    assert_close(run(case), dense(case))


@pytest.mark.parametrize("queries", [1, 30])
def test_a_window_hides_keys_of_a_guest_though_nothing_is_causal(kernel, queries):
    """What a creditor computes: all of its keys are in the past, some behind the window."""
    case = random_case(15, shapes=[(queries, 96)], causal=False, holes=False, window=20)
    case.rows[0] = case.rows[0]._replace(query_position=100)
    got = run(case)
    assert_close(got, dense(case))
    seen = [min(20, max(0, 96 - (100 + query - 20 + 1))) for query in range(queries)]
    assert [bool(lse.isfinite().all()) for lse in got[1]] == [count > 0 for count in seen]


def test_blocks_behind_the_window_are_not_read(kernel):
    case = random_case(16, shapes=[(1, 160), (30, 160)], holes=False, window=20)
    want = run(case)
    for row in case.rows:
        hidden = (row.query_position - 20 + 1) // 16
        case.k_cache[row.blocks[:hidden]] = torch.nan
        if kernel != "reference":
            case.v_cache[row.blocks[:hidden]] = torch.nan
    for got, expected in zip(run(case), want, strict=True):
        assert torch.equal(got, expected)


def test_soft_capping_holds_for_scores_of_every_size(kernel):
    case = random_case(17, shapes=[(1, 64)], causal=False, scale=1.0, softcap=3.0)
    case.q.zero_()
    case.q[..., 0] = 1.0
    sizes = torch.logspace(-6, 4, 32)
    case.k_cache[..., 0] = torch.cat((sizes, -sizes)).reshape(4, 1, 16)[
        torch.arange(case.k_cache.shape[0]) % 4
    ]
    assert_close(run(case), dense(case), tol=2e-6)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("queries", [1, 30])
def test_empty_and_one_token_parts(kernel, queries, tokens):
    case = random_case(3, shapes=[(queries, tokens)], causal=False)
    out, lse = run(case)
    assert_close((out, lse), dense(case))
    if not tokens:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("queries", [1, 30])
def test_queries_before_every_key_have_an_empty_result(kernel, queries):
    case = random_case(4, shapes=[(queries, 40)], holes=False)
    case.rows[0] = case.rows[0]._replace(query_position=0, first_token=[100, 116, 132])
    out, lse = run(case)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_no_rows_at_all(kernel):
    case = random_case(5, shapes=[])
    out, lse = run(case)
    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("queries", [1, 30])
def test_extreme_logits(kernel, queries, sign, dtype):
    """Scores of about +-10,000 that every dtype holds exactly, a few units apart."""
    case = random_case(6, shapes=[(queries, 200)], dtype=dtype, causal=False, scale=0.5)
    steps = torch.arange(case.k_cache.shape[0] * 16).reshape(-1, 1, 16) % 7
    case.q.zero_()
    case.q[..., 0], case.q[..., 1] = 128.0 * sign, 1.0
    case.k_cache.zero_()
    case.k_cache[..., 0], case.k_cache[..., 1] = 156.0, steps.to(dtype)
    want = dense(case)
    assert want[1].abs().min() > 9_900
    got = run(case)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-7, atol=1e-3)


def test_opposite_extremes_do_not_leak(kernel):
    """The one key with score +10,000 takes all the weight from those with -10,000."""
    case = random_case(7, shapes=[(1, 130), (30, 130)], causal=False, scale=1.0)
    case.q.zero_()
    case.q[..., 0] = 100.0
    case.k_cache[..., 0] = -100.0
    for row in case.rows:
        case.k_cache[row.blocks[4], :, 5, 0] = 100.0
    out, lse = run(case)
    assert_close((out, lse), dense(case))
    assert (lse == 10_000).all()


def test_a_row_of_128k_tokens(kernel):
    tokens, block_size, dim = 131_072, 64, 16
    count = tokens // block_size
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(count, 2, 1, block_size, dim, generator=generator)
    order = torch.randperm(count, generator=generator)
    q = torch.randn(1, 2, dim, generator=generator)
    row = PagedRow(1, tokens - 1, order.tolist(), list(range(0, tokens, block_size)), tokens)
    got = micro_attention(
        q, pool[:, 0], pool[:, 1], PagedBatch.build([row]), AttentionSpec(1.0), causal=True
    )
    k, v = pool[order].double().permute(1, 2, 0, 3, 4).reshape(2, tokens, dim)
    scores = q[0].double() @ k.T
    assert_close(got, ((scores.softmax(-1) @ v)[None], scores.logsumexp(-1)[None]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_results_do_not_depend_on_batch_mates(kernel, dtype):
    shapes = [(1, 2500), (30, 90), (1, 1), (3, 300), (0, 0), (70, 1200)]
    case = random_case(8, shapes=shapes, dtype=dtype)
    out, lse = run(case)
    start = 0
    for index, (queries, _) in enumerate(shapes):
        alone_out, alone_lse = run(case.subset([index]))
        assert torch.equal(out[start : start + queries], alone_out)
        assert torch.equal(lse[start : start + queries], alone_lse)
        start += queries


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    shapes = [(1, 9000), (30, 90), (70, 1200), (20, 9000)]
    case = random_case(9, shapes=shapes, dtype=dtype, holes=False)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(case))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_fills_given_outputs_and_reads_strided_queries(kernel):
    case = random_case(10, shapes=[(1, 40), (5, 60)])
    fused = torch.zeros(6, 3, 4, 32)
    fused[:, 1] = case.q
    case.q = fused[:, 1]
    out, lse = torch.full((6, 4, 32), torch.nan), torch.full((6, 4), torch.nan)
    got = micro_attention(
        case.q,
        case.k_cache,
        case.v_cache,
        case.batch,
        case.spec,
        causal=True,
        out=out,
        lse=lse,
    )
    assert got[0] is out
    assert got[1] is lse
    assert_close(got, dense(case))


def test_one_kv_head_with_an_arbitrary_stride_is_contiguous_enough(kernel):
    case = random_case(11, shapes=[(1, 40)], kv_heads=1)
    wide = torch.zeros(case.k_cache.shape[0], 2, 16, 32)
    wide[:, :1] = case.k_cache
    case.k_cache = wide[:, :1].as_strided((wide.shape[0], 1, 16, 32), (1024, 7, 32, 1))
    assert_close(run(case), dense(case))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: setattr(c, "q", c.q.double()), "must share one of"),
        (lambda c: setattr(c, "q", c.q.half()), "must share one of"),
        (lambda c: setattr(c, "q", c.q[:, :3]), "does not fit a cache"),
        (lambda c: setattr(c, "q", c.q[0]), r"q must be \[T, H, D\]"),
        (lambda c: setattr(c, "q", c.q[:2]), "the rows own 3 queries"),
        (lambda c: setattr(c, "q", c.q.transpose(0, 1).contiguous().transpose(0, 1)), "contiguous"),
        (lambda c: setattr(c, "k_cache", c.k_cache.transpose(1, 2)), "q must be|does not fit|KV"),
        (lambda c: c.rows.append(PagedRow(0, 0, [999], [0], 3)), r"blocks must lie in \[0"),
        (lambda c: c.rows.append(PagedRow(0, 0, [-1], [0], 3)), r"blocks must lie in \[0"),
        (lambda c: c.rows.append(PagedRow(0, 0, [1], [0], 17)), "row 2 has kv_len 17"),
        (lambda c: c.rows.append(PagedRow(0, 0, [1, 2], [0], 17)), "2 blocks but 1 positions"),
    ],
)
def test_what_does_not_fit_is_refused(kernel, change, text):
    case = random_case(12, shapes=[(1, 40), (2, 20)])
    change(case)
    with pytest.raises(ValueError, match=text):
        run(case)


def test_outputs_that_do_not_fit_are_refused(kernel):
    case = random_case(13, shapes=[(1, 40)])
    with pytest.raises(ValueError, match="lse must be contiguous float32"):
        micro_attention(
            case.q,
            case.k_cache,
            case.v_cache,
            case.batch,
            case.spec,
            causal=True,
            lse=torch.empty(4, 1),
        )


def test_options_that_do_not_fit_are_refused(kernel):
    case = random_case(18, shapes=[(1, 40)])
    case.spec = AttentionSpec(1.0, slopes=torch.ones(3))
    with pytest.raises(ValueError, match="3 slopes do not fit the 4 heads"):
        run(case)
    for wrong in ({"window": -1}, {"window": 2**31}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match="must not be negative"):
            AttentionSpec(1.0, **wrong)
    with pytest.raises(ValueError, match="float32"):
        AttentionSpec(1.0, slopes=torch.ones(4, dtype=torch.float64))


def test_a_batch_of_wrong_dtype_or_length_is_refused():
    good = PagedBatch.build([PagedRow(1, 0, [0], [0], 1)])
    parts = vars(good)
    with pytest.raises(ValueError, match="blocks must be int32"):
        PagedBatch(**{**parts, "blocks": good.blocks.long()})
    with pytest.raises(ValueError, match="query_start must be contiguous of shape"):
        PagedBatch(**{**parts, "query_start": good.query_start[:1]})
