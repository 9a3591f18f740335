"""FlashInfer's kernels, as their documentation has them, behind the one function."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import flashinfer_double as double
import pytest
import torch
from attention_oracle import Case, assert_close, cases, dense, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_distkv.attention import PagedRow, flashinfer, micro_attention
from hpc_distkv.comm.local.threads import open_local
from hpc_distkv.errors import OptionError
from hpc_distkv.start import capacity
from hpc_distkv.start.loading import bind
from hpc_distkv.start.options import EngineOptions

CPU = torch.device("cpu")


@pytest.fixture
def wrappers(monkeypatch):
    """All that are made; the backend is there, on the CPU."""
    monkeypatch.setattr(double.BatchPrefillWithPagedKVCacheWrapper, "made", made := [])
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 16)
    backend = flashinfer.FlashInfer(double, CPU)
    monkeypatch.setattr(flashinfer, "kernels", lambda device: backend)
    return made


def run(case: Case, batch=None):
    spec = replace(case.spec, backend="flashinfer")
    batch = batch or case.batch
    return micro_attention(case.q, case.k_cache, case.v_cache, batch, spec, causal=case.causal)


def check(case: Case) -> None:
    """Outputs are rounded to the dtype of queries, log-sum-exps are not."""
    out, lse = run(case)
    want_out, want_lse = dense(case)
    assert_close((out,), (want_out,), 1e-2 if case.q.dtype == torch.bfloat16 else 2e-3)
    assert_close((lse,), (want_lse,), 2e-5 if case.spec.slopes is None else 1e-4)


def own(case: Case, gap: int) -> Case:
    """With `gap` tokens elsewhere before each row's last rBlock but one, and the queries at the end
    of what the row has."""
    rows = []
    for row in case.rows:
        first = [16 * index for index in range(len(row.blocks))]
        first[-2:] = [position + gap for position in first[-2:]]
        end = row.kv_len + gap
        rows.append(row._replace(first_token=first, query_position=end - row.queries))
    case.rows = rows
    return case


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases(), dim=st.sampled_from([64, 128]))
def test_whatever_it_serves_or_leaves_to_others_is_right(wrappers, case, dim):
    dtype = torch.float16 if case.q.dtype == torch.float32 else case.q.dtype
    generator = torch.Generator().manual_seed(dim)
    for name in ("q", "k_cache", "v_cache"):
        shape = (*getattr(case, name).shape[:-1], dim)
        setattr(case, name, torch.randn(shape, generator=generator).to(dtype))
    check(case)


@pytest.mark.parametrize("gap", [0, 48])
@pytest.mark.parametrize("shapes", [[(1, 200), (1, 33)], [(20, 150)], [(1, 90), (20, 60), (0, 9)]])
def test_own_rows_with_and_without_gaps_are_served(wrappers, shapes, gap):
    check(own(random_case(1, shapes=shapes, dim=64, group=4, dtype=torch.float16), gap))
    (wrapper,) = wrappers
    assert wrapper.runs == 1
    assert wrapper.backend == "fa2"


def test_guests_are_served_wherever_they_come_from(wrappers):
    check(random_case(2, shapes=[(3, 96), (1, 32)], causal=False, dim=64, dtype=torch.bfloat16))
    assert [wrapper.runs for wrapper in wrappers] == [1]


@pytest.mark.parametrize(
    ("options", "gap", "served"),
    [
        ({"softcap": 2.0}, 48, True),
        ({"window": 40}, 0, True),
        ({"window": 40, "softcap": 2.0}, 0, True),
        ({"window": 40}, 48, False),
        ({"window": 40, "causal": False}, 0, False),
        ({"slopes": True}, 0, False),
        ({"scale": 0.3}, 0, True),
    ],
    ids=str,
)
def test_options_are_served_where_masks_mean_the_same(wrappers, options, gap, served):
    shapes = [(1, 100), (20, 70)]
    check(own(random_case(3, shapes=shapes, dim=64, dtype=torch.float16, **options), gap))
    assert bool(wrappers) == served


@pytest.mark.parametrize(
    "row",
    [
        PagedRow(1, 0, [], [], 0),
        PagedRow(1, 30, [0, 1], [0, 16], 32),
        PagedRow(20, 20, [0, 1], [0, 24], 32),
        PagedRow(1, 31, [1, 0], [16, 0], 32),
    ],
    ids=["no keys", "not the last key", "a gap among the queries", "out of order"],
)
def test_rows_it_would_mask_otherwise_are_left_to_others(wrappers, row):
    case = random_case(4, shapes=[(row.queries, 32)], dim=64, dtype=torch.float16)
    case.rows = [row]
    check(case)
    assert not wrappers


def test_a_batch_is_planned_once_for_all_layers_and_wrappers_are_used_again(wrappers):
    case = own(random_case(5, shapes=[(1, 40), (1, 70)], dim=64, dtype=torch.float16), 0)
    for _ in range(3):
        batch = case.batch
        others = own(random_case(6, shapes=[(1, 40)], dim=64, dtype=torch.float16), 0)
        kept = others.batch  # two that live at once need one each
        for _ in range(2):
            assert_close(run(case, batch), dense(case), 2e-3)
            assert_close(run(others, kept), dense(others), 2e-3)
        del batch, kept
    assert [wrapper.runs for wrapper in wrappers] == [6, 6]


def test_a_batch_that_does_not_fit_is_refused(wrappers):
    case = random_case(7, shapes=[(1, 40)], dim=64, dtype=torch.float16)
    case.rows.append(PagedRow(0, 0, [999], [0], 3))
    with pytest.raises(ValueError, match=r"blocks must lie in \[0"):
        run(case)


def test_it_takes_nothing_unless_asked_nor_without_a_gpu(wrappers, monkeypatch):
    case = own(random_case(8, shapes=[(1, 40)], dim=64, dtype=torch.float16), 0)
    micro_attention(case.q, case.k_cache, case.v_cache, case.batch, case.spec, causal=True)
    assert not wrappers
    monkeypatch.undo()
    assert flashinfer.kernels(CPU) is None


def test_what_is_missing_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert "pip install flashinfer-python" in (flashinfer.missing() or "")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    assert flashinfer.missing() is None


def test_without_gpus_it_is_refused_at_start():
    (comm,) = open_local(1)
    with pytest.raises(OptionError, match="--attention-backend flashinfer cannot be: it needs GPU"):
        bind(comm, EngineOptions(device="cpu", attention_backend="flashinfer"))


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "ninja"), "directory: 'ninja'"),
        (RuntimeError("Ninja build failed" + 5000 * "." + "error: sm_999"), r"\.{900}.*sm_999"),
    ],
    ids=["no ninja", "no compiler"],
)
def test_kernels_that_cannot_be_compiled_are_an_option_that_cannot_be(
    wrappers, monkeypatch, trouble, said
):
    def plan(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr(double.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    case = own(random_case(8, shapes=[(1, 40)], dim=64, dtype=torch.float16), 0)
    monkeypatch.setattr(capacity, "activation_peak", lambda *_: run(case))
    comm = SimpleNamespace(
        device=SimpleNamespace(place=SimpleNamespace(type="cuda")), world=open_local(1)[0].world
    )
    config = capacity.EngineConfig(num_blocks=1, block_size=16)
    pattern = rf"(?s)^--attention-backend flashinfer cannot be: FlashInfer.{{0,1000}}{said}.*nvcc"
    with pytest.raises(flashinfer.FlashInferError, match=pattern):
        capacity.pool_blocks(comm, None, EngineOptions(), config, 1, None)


@pytest.mark.skipif(
    not torch.cuda.is_available() or flashinfer.missing() is not None,
    reason="needs a GPU and FlashInfer",
)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"window": 40}, {"causal": False}], ids=str
)
@pytest.mark.parametrize("shapes", [[(1, 3000), (1, 33)], [(200, 1500)], [(1, 900), (20, 60)]])
def test_its_own_kernels_do_what_the_double_does(shapes, options):
    case = random_case(9, shapes=shapes, dim=128, group=4, dtype=torch.bfloat16, **options)
    if case.causal:
        own(case, 0)
    want_out, want_lse = dense(case)
    on = (tensor.cuda() for tensor in (case.q, case.k_cache, case.v_cache))
    spec = replace(case.spec, backend="flashinfer")
    out, lse = micro_attention(*on, case.batch, spec, causal=case.causal)
    assert_close((out.cpu(),), (want_out,), 2e-2)
    assert_close((lse.cpu(),), (want_lse,), 1e-3)
