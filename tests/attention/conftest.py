"""Every kernel passes the same tests."""

from __future__ import annotations

import platform

import pytest

from hpc_distkv.attention.cpu import native

NARROW = {"avx2": ["cc", "-mno-avx512f"], "sse": ["cc", "-mno-avx"]}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Kernels by name; the narrow ones are what a machine without the wider vectors would build."""
    found = {"native": native.kernels(), "reference": None}
    if platform.machine() == "x86_64" and found["native"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            for name, compiler in NARROW.items():
                found[name] = native._loaded(compiler)
    return found


@pytest.fixture(params=["native", "avx2", "sse", "reference"])
def kernel(request, built, monkeypatch):
    name = request.param
    if name != "reference" and not built.get(name):
        pytest.skip(f"no {name} kernels on this machine")
    monkeypatch.setattr(native, "kernels", lambda: built[name])
    return name


@pytest.fixture
def compiled(built, monkeypatch):
    if not built["native"]:
        pytest.skip("no C compiler")
    monkeypatch.setattr(native, "kernels", lambda: built["native"])
