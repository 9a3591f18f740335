from __future__ import annotations

import pytest
import torch

from hpc_distkv.bench.kernels import Heads, KernelBench, kernel_figures

SMALL = Heads(query=4, kv=2, dim=32, dtype=torch.float32)


def test_every_case_that_fits_is_measured_and_right():
    figures = kernel_figures(
        torch.device("cpu"),
        lengths=(64, 200),
        batches=(1, 4),
        prompts=((2, 30, 30), (1, 16, 96)),
        most_tokens=300,
        block_size=16,
        heads=SMALL,
    )
    assert [(d["batch"], d["tokens"]) for d in figures["decode"]] == [(1, 64), (4, 64), (1, 200)]
    assert [p["tokens"] for p in figures["prompt"]] == [30, 96]
    for case in (*figures["decode"], *figures["prompt"]):
        assert case["seconds"] > 0
        assert case["out_error"] < 1e-5
        assert case["lse_error"] < 1e-5
    for case in figures["decode"]:
        of_copy = case["bytes_per_second"] / figures["copy_bytes_per_second"]
        assert case["of_copy"] == pytest.approx(of_copy)
        assert case["bytes_per_second"] * case["seconds"] == pytest.approx(
            case["batch"] * case["tokens"] * 2 * 2 * 32 * 4
        )


def test_a_wrong_result_shows_as_an_error(monkeypatch):
    from hpc_distkv.bench import kernels

    right = kernels.micro_attention

    def wrong(*args, out, lse, **options):
        right(*args, out=out, lse=lse, **options)
        out[-1, -1] += 1
        lse[-1, -1] = torch.nan

    monkeypatch.setattr(kernels, "micro_attention", wrong)
    (prompt,) = [KernelBench(torch.device("cpu"), SMALL, 16, 64).prompt(1, 30, 30)]
    assert prompt["out_error"] > 1e-3
    assert prompt["lse_error"] != prompt["lse_error"]
