"""A file is replaced in one piece, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_distkv.regular import replace_file


def test_the_file_takes_the_place_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "out", []
    path.write_bytes(b"old")
    (tmp_path / "link").symlink_to(path)
    fsync, replace = os.fsync, Path.replace

    def synced(fd: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def renamed(fresh: Path, to: Path) -> Path:
        done.append("renamed")
        return replace(fresh, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    replace_file(tmp_path / "link", [b"n", b"ew"])
    assert re.fullmatch(r"out\.hpc-distkv-\w{16}\.tmp", done.pop(0))
    assert done == ["renamed", tmp_path.name]
    assert (tmp_path / "link").is_symlink()
    assert path.read_bytes() == b"new"


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        replace_file(path, pieces())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
