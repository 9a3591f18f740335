"""What is no regular file is refused, and keeps nobody waiting."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hpc_distkv.batch.errors import InputError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.results.answered import read_answered
from hpc_distkv.errors import OptionError
from hpc_distkv.observe.summary.run_files import RunFileError, read_run
from hpc_distkv.regular import open_regular, read_regular
from hpc_distkv.simulate.workload import Workload

WHY = "regular file|directory|such device"


@pytest.fixture(params=["pipe", "folder", "socket", "device"])
def no_file(request, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("place.toml")
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
        case "device":
            path.symlink_to("/dev/null")
    return path


def test_no_reader_waits_for_it(no_file):
    with pytest.raises(OSError, match=WHY):
        open_regular(no_file)
    with pytest.raises(InputError, match=r"^cannot read place.toml: .+\.$"):
        Intake(no_file)
    with pytest.raises(OSError, match=WHY):
        read_answered(no_file)
    with pytest.raises(RunFileError):
        read_run([no_file])
    with pytest.raises(OptionError, match=r"^place.toml cannot be read: "):
        Workload.load(f"{no_file}#any")


def test_a_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    assert read_regular(tmp_path / "file") == b"text"
