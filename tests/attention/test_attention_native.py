from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpc_distkv.attention.cpu import native

# Prints whether kernels were loaded, and the first lse of one query with one key of score 2.
PROGRAM = """
import logging, torch
logging.basicConfig()
from hpc_distkv.attention.cpu import native
from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, micro_attention
one = torch.zeros(1, 1, 16); one[..., 0] = 2
batch = PagedBatch.build([PagedRow(1, 0, [0], [0], 1)])
cache = one[None].contiguous()
out, lse = micro_attention(one, cache, cache, batch, AttentionSpec(0.5), causal=True)
print(native.kernels() is not None, lse.item())
"""


def start(program: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_cc_forces_the_fallback_without_a_warning():
    out, err = start(PROGRAM, HPC_DISTKV_NO_CC="1").communicate(timeout=60)
    assert (out.split(), err) == (["False", "2.0"], "")


def test_a_failing_compiler_is_one_warning_and_the_fallback(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "gcc").symlink_to(broken)
    process = start(PROGRAM, PATH=str(tmp_path), CC=str(broken), XDG_CACHE_HOME=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert out.split() == ["False", "2.0"]
    assert err.count("WARNING") == 1
    assert "no licence" in err
    assert "$CC" in err


@pytest.mark.usefixtures("compiled")
def test_builds_that_race_leave_one_library(tmp_path):
    processes = [start(PROGRAM, XDG_CACHE_HOME=str(tmp_path)) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (out.split(), err) == (["True", "2.0"], "")
    left = list((tmp_path / "hpc_distkv").iterdir())
    assert [path.suffix for path in left] == [".so"]


@pytest.mark.usefixtures("compiled")
def test_a_home_that_cannot_be_written_still_builds(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    out, _ = start(PROGRAM, XDG_CACHE_HOME=str(blocked), TMPDIR=str(tmp_path)).communicate(
        timeout=120
    )
    assert out.split() == ["True", "2.0"]
    assert list(tmp_path.iterdir()) == [blocked], "the private folder is removed"


@pytest.mark.usefixtures("compiled")
def test_a_damaged_library_is_not_loaded_but_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "COMPILE", ("-O0", *native.COMPILE[1:]))  # soon done
    native._loaded(["cc"])
    [kept] = (tmp_path / "hpc_distkv").iterdir()
    whole = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(whole[:3000])
    native._loaded(["cc"])
    assert kept.read_bytes() == whole
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("what is whole is not built"))
    native._loaded(["cc"])


@pytest.mark.usefixtures("compiled")
def test_one_openmp_serves_torch_and_the_kernels():
    program = PROGRAM + (
        "maps = open('/proc/self/maps').read()\n"
        "print({line.split()[-1] for line in maps.splitlines() if 'gomp' in line})\n"
    )
    out, _ = start(program).communicate(timeout=60)
    assert len(eval(out.splitlines()[-1])) == 1


@pytest.mark.usefixtures("compiled")
def test_loading_the_kernels_keeps_denormals():
    program = PROGRAM + "print((torch.tensor([1e-40]) * 0.5).item() > 0)\n"
    out, _ = start(program).communicate(timeout=60)
    assert out.splitlines()[-1] == "True"
