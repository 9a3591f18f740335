"""Only what this user has put into the cache of compiled kernels, and as it was, comes out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from hpc_distkv.attention.cpu.kernel_cache import KernelCache, UnsafeError, user_cache

KEY, LIBRARY = "0123abcd", b"code"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
STRANGER = 12345


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Of the cache, which holds a library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with user_cache() as cache:
        assert cache
        cache.keep(KEY, LIBRARY)
    return tmp_path / "hpc_distkv"


def found() -> bytes | None:
    with user_cache() as cache:
        path = cache.find(KEY) if cache else None
        return path.read_bytes() if path else None


def test_what_is_kept_is_found_by_its_key_alone(folder):
    assert found() == LIBRARY
    assert folder.stat().st_mode & 0o777 == 0o700
    with user_cache() as cache:
        assert cache
        assert cache.find("0123") is None


def damaged(kept: Path) -> None:
    kept.write_bytes(LIBRARY[:-1])


def writable(kept: Path) -> None:
    kept.chmod(0o620)


def linked(kept: Path) -> None:
    kept.rename(kept.parent.parent / "elsewhere")
    kept.symlink_to(kept.parent.parent / "elsewhere")


def pipe(kept: Path) -> None:
    kept.unlink()
    os.mkfifo(kept)


def given_away(kept: Path) -> None:
    os.chown(kept, STRANGER, -1)


@pytest.mark.parametrize(
    "spoil", [damaged, writable, linked, pipe, pytest.param(given_away, marks=AS_ROOT)]
)
def test_a_library_that_may_be_anybodys_is_removed_and_not_found(spoil, folder):
    [kept] = folder.iterdir()
    spoil(kept)
    assert found() is None
    assert list(folder.iterdir()) == []
    with user_cache() as cache:
        assert cache
        cache.keep(KEY, LIBRARY)
    assert found() == LIBRARY


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def open_to_the_group(folder: Path) -> None:
    folder.chmod(0o770)


def of_a_stranger(folder: Path) -> None:
    os.chown(folder, STRANGER, -1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (open_to_all, "chmod go-w"),
        (open_to_the_group, "chmod go-w"),
        pytest.param(of_a_stranger, "belongs to another user", marks=AS_ROOT),
    ],
)
def test_nothing_comes_from_a_folder_where_others_may_write(spoil, said, folder, caplog):
    spoil(folder)
    assert found() is None
    assert said in caplog.text
    assert len(list(folder.iterdir())) == 1


def test_the_folder_is_no_link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    assert found() is None


def test_a_folder_that_is_exchanged_while_it_is_open_is_not_looked_into(folder):
    with KernelCache.open(folder) as cache:
        folder.rename(folder.with_name("elsewhere"))
        folder.mkdir()
        [kept] = folder.with_name("elsewhere").iterdir()
        (folder / kept.name).write_bytes(b"planted")
        path = cache.find(KEY)
        assert path
        assert path.read_bytes() == LIBRARY


@pytest.mark.parametrize("home", ["/proc/nowhere", None])
def test_without_a_home_there_is_no_cache_and_no_word(home, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr(Path, "home", no_home)
    caplog.set_level(logging.WARNING)
    with user_cache() as cache:
        assert cache is None
    assert caplog.text == ""


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_an_unsafe_folder_is_an_error_of_its_own(tmp_path):
    tmp_path.chmod(0o757)
    with pytest.raises(UnsafeError), KernelCache.open(tmp_path):
        pass
