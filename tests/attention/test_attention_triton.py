from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc_distkv.attention.triton import backend

CASES = Path(__file__).with_name("triton_cases.py")


def test_triton_kernels_are_right_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_only_gpus_are_served_by_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.kernels(torch.device("cpu")) is None


def test_without_triton_a_gpu_falls_back_to_torch_with_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "hpc_distkv.attention.triton.kernels", None)
    backend._kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert backend.kernels(torch.device("cuda", 0)) is None
        assert backend.kernels(torch.device("cuda", 0)) is None
    backend._kernels.cache_clear()
    (record,) = caplog.records
    assert "install the triton that belongs to torch" in record.getMessage()


def test_without_a_compiler_a_gpu_falls_back_to_torch_with_a_warning(monkeypatch, caplog):
    """Triton looks for one when it is first used."""
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(runtime, "driver", Driver())
    backend._kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert backend.kernels(torch.device("cuda", 0)) is None
    backend._kernels.cache_clear()
    (record,) = caplog.records
    assert "a C compiler and Python's headers (Failed to find C" in record.getMessage()
