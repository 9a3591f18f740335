"""One run at a time writes to a results file, and a run that was killed locks nobody out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.results import claim as claim_module
from hpc_distkv.batch.results.claim import Claim, Owner, read_claim
from hpc_distkv.batch.results.side_files import claim_path

ELSEWHERE = "another machine"


def leave(output: Path, **fields: object) -> Path:
    """The claim of a run that is no more, or is on another machine."""
    path = claim_path(output)
    owner = msgspec.structs.replace(Owner.here(), token="other", **fields)
    path.write_bytes(msgspec.json.encode(owner))
    return path


def nap(seconds: float) -> None:
    """Time flies."""


def test_a_claim_is_there_until_it_is_released(tmp_path: Path) -> None:
    with Claim.take(tmp_path / "out") as claim:
        claim.check()
        owner = read_claim(tmp_path / "out")
        assert owner is not None
        assert owner.pid == os.getpid()
        with pytest.raises(JournalError, match=f"process {os.getpid()} on .*Wait until it ends"):
            Claim.take(tmp_path / "out", nap)
    assert list(tmp_path.iterdir()) == []
    claim.release()


def test_a_claim_is_of_the_file_whatever_it_is_called_by(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with Claim.take(tmp_path / "out"), pytest.raises(JournalError, match="another run writes to"):
        Claim.take(tmp_path / "link", nap)


def test_a_killed_run_on_this_machine_is_void_at_once(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path;"
        "from hpc_distkv.batch.results.claim import Claim;"
        "Claim.take(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert claim_path(tmp_path / "out").exists()
    assert read_claim(tmp_path / "out") is None
    waits: list[float] = []
    with Claim.take(tmp_path / "out", waits.append) as claim:
        claim.check()
    assert waits == [claim_module.SETTLE]


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    leave(tmp_path / "out", began="1")
    Claim.take(tmp_path / "out", nap).release()
    assert read_claim(tmp_path / "out") is None


def test_a_run_elsewhere_that_gives_signs_of_life_is_left_alone(tmp_path: Path) -> None:
    path = leave(tmp_path / "out", machine=ELSEWHERE, host="nid7", job="1234")
    with pytest.raises(JournalError, match="on nid7, Slurm job 1234"):
        Claim.take(tmp_path / "out", lambda _: os.utime(path, ns=(1, time.time_ns())))
    assert path.exists()


def test_a_run_elsewhere_that_gives_none_for_a_while_is_void(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path / "out", machine=ELSEWHERE, host="nid7")
    waits: list[float] = []
    with Claim.take(tmp_path / "out", waits.append) as claim:
        claim.check()
    assert sum(waits) >= claim_module.STALE
    (said,) = caplog.messages
    assert "on nid7" in said
    assert "waiting for a sign of life" in said


def test_a_claim_torn_by_a_full_disk_is_void_after_a_while(tmp_path: Path) -> None:
    claim_path(tmp_path / "out").write_bytes(b'{"host"')
    Claim.take(tmp_path / "out", nap).release()


def test_of_two_that_take_over_one_void_claim_the_last_one_has_it(tmp_path: Path) -> None:
    path = leave(tmp_path / "out", machine=ELSEWHERE)

    def overtaken(seconds: float) -> None:
        if seconds == claim_module.SETTLE:
            leave(tmp_path / "out", machine=ELSEWHERE, host="faster")

    with pytest.raises(JournalError, match="on faster"):
        Claim.take(tmp_path / "out", overtaken)
    assert path.exists()


def test_a_run_that_was_suspended_finds_out_and_leaves_the_new_claim_alone(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path / "out")
    path = leave(tmp_path / "out", machine=ELSEWHERE)
    with pytest.raises(JournalError, match="taken over"):
        claim.check()
    claim.release()
    assert path.exists()


def test_a_running_run_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "HEARTBEAT", 0.01)
    with Claim.take(tmp_path / "out"):
        path = claim_path(tmp_path / "out")
        os.utime(path, (0, 0))
        limit = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < limit:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot use /proc/out for the results"):
        Claim.take(Path("/proc/out"))
