"""The results file survives what can happen to it, and refuses what it cannot make sense of."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from batch_fakes import open_journal

from hpc_distkv.batch.answers.line import error_line
from hpc_distkv.batch.errors import JournalError, RowError
from hpc_distkv.batch.merge import merge
from hpc_distkv.batch.results import opening
from hpc_distkv.batch.results.order import InputOrder
from hpc_distkv.batch.results.side_files import claim_path
from hpc_distkv.batch.status import read_status

JOB = {"model": "f00d", "defaults": {"temperature": 1.0, "top_k": 0}}
ERROR = RowError("no")


def line(number: int, custom_id: str | None = None) -> bytes:
    return error_line(number, custom_id, ERROR)


def started(path: Path, rows: int = 3) -> Path:
    journal = open_journal(path, JOB)
    for number in range(rows):
        journal.append(line(number, f"row {number}"))
    journal.close()
    return path


def test_rerun_finds_what_was_written(tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    journal = open_journal(path, JOB)
    journal.append(line(3))
    journal.append(error_line(4, "row 0", RowError("twice", code="duplicate_custom_id")))
    journal.close()
    answered = open_journal(path, JOB).answered
    assert answered.custom_ids == {"row 0", "row 1", "row 2"}
    assert answered.others == {(None, 3): 1, ("row 0", 4): 1}
    assert answered.failed == 5


def test_fingerprint_lies_beside_the_results_before_the_first_row(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "out", JOB)
    assert json.loads((tmp_path / "out.meta.json").read_bytes()) == {"format": 1, **JOB}
    assert (tmp_path / "out").read_bytes() == b""
    journal.close()


def test_a_rerun_knows_where_the_error_rows_are(tmp_path: Path) -> None:
    path, errors = tmp_path / "out", tmp_path / "errors"
    open_journal(path, JOB, errors=errors).close()
    errors.write_bytes(b"")
    with pytest.raises(JournalError, match=f"give --error-file {errors}"):
        open_journal(path, JOB)
    open_journal(path, JOB, errors=errors).close()
    errors.unlink()
    open_journal(path, JOB).close()


def test_a_job_that_is_requeued_drops_what_was_there_once(tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    open_journal(path, JOB, overwrite=True, job="7", restarted=True).close()
    assert path.read_bytes() == b""  # its first start did not get so far
    journal = open_journal(path, JOB, overwrite=True, job="7")
    journal.append(line(0))
    journal.close()
    open_journal(path, JOB, overwrite=True, job="7", restarted=True).close()
    assert path.read_bytes() == line(0) + b"\n"
    open_journal(path, JOB, overwrite=True, job="7").close()
    assert path.read_bytes() == b""


def test_a_job_that_is_requeued_answers_error_rows_again_once(tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    job: dict[str, Any] = {"retry_errors": True, "job": "7"}
    journal = open_journal(path, JOB, **job, restarted=True)
    assert path.read_bytes() == b""  # its first start did not get so far
    journal.append(line(0, "row 0"))
    journal.close()
    open_journal(path, JOB, job="8").close()  # not asked to drop anything
    open_journal(path, JOB).close()
    journal = open_journal(path, JOB, **job, restarted=True)
    assert journal.answered.failed == 1
    journal.close()
    open_journal(path, JOB, **job).close()
    assert path.read_bytes() == b""


def test_an_end_before_error_rows_are_dropped_leaves_them_to_the_requeued_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = started(tmp_path / "out")
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left"))
    monkeypatch.setattr(opening, "drop_lines", full)
    with pytest.raises(JournalError):
        open_journal(path, JOB, retry_errors=True, job="7")
    monkeypatch.undo()
    open_journal(path, JOB, retry_errors=True, job="7", restarted=True).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("option", ["overwrite", "retry_errors"])
def test_what_a_requeued_job_wrote_itself_stays(option: str, tmp_path: Path) -> None:
    job: dict[str, Any] = {option: True, "job": "7"}
    journal = open_journal(tmp_path / "out", JOB, **job)
    journal.append(line(0))
    journal.close()
    assert open_journal(tmp_path / "out", JOB, **job, restarted=True).answered.failed == 1


def test_another_job_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    before = path.read_bytes()
    other = {"model": "beef", "defaults": {"temperature": 0.5, "top_k": 0}, "new": True}
    with pytest.raises(JournalError) as caught:
        open_journal(path, other)
    message = str(caught.value)
    assert 'model was "f00d", now "beef"' in message
    assert "defaults.temperature was 1.0, now 0.5" in message
    assert "new was absent, now true" in message
    assert "top_k" not in message
    assert "--overwrite" in message
    assert path.read_bytes() == before
    journal = open_journal(path, other, overwrite=True)
    journal.close()
    assert path.read_bytes() == b""
    open_journal(path, other).close()


def test_results_of_unknown_origin_are_refused_unless_empty(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"precious\n")
    with pytest.raises(JournalError, match=r"out\.meta\.json"):
        open_journal(path, JOB)
    assert path.read_bytes() == b"precious\n"
    path.write_bytes(b"")
    open_journal(path, JOB).close()


@pytest.mark.parametrize(
    "tail", [b"{", b'{"id":"batch_req_17","cus', b'{"id":"b' + b"\0" * 99, b"\0" * 4096, b"\n"]
)
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = started(tmp_path / "out")
    sound = path.read_bytes()
    path.write_bytes(sound + tail)
    journal = open_journal(path, JOB)
    assert len(journal.answered.custom_ids) == 3
    assert path.read_bytes() == sound
    journal.append(line(9))
    journal.close()
    assert path.read_bytes() == sound + line(9) + b"\n"


@pytest.mark.parametrize(
    "foreign",
    [b'{"id": "x"}\n', b"\xff\n", b"[" * 9999, b"note to self", b'{"id":"batch_req_x"}', b"{}"],
)
def test_a_last_line_of_another_program_is_named_and_kept(tmp_path: Path, foreign: bytes) -> None:
    path = started(tmp_path / "out")
    whole = path.read_bytes() + foreign
    path.write_bytes(whole)
    with pytest.raises(JournalError, match="line 4 is not a result line"):
        open_journal(path, JOB)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("spaced", [False, True])
def test_a_last_line_without_newline_is_not_trusted(spaced: bool, tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    lines = path.read_bytes().splitlines()
    if spaced:
        lines = [json.dumps(json.loads(each)).encode() for each in lines]
    path.write_bytes(b"\n".join(lines))
    journal = open_journal(path, JOB)
    assert journal.answered.custom_ids == {"row 0", "row 1"}
    journal.append(line(2, "row 2"))
    journal.close()
    assert open_journal(path, JOB).answered.custom_ids == {"row 0", "row 1", "row 2"}


@pytest.mark.parametrize(
    "corrupt",
    [
        b"",
        b"{",
        b"{}",
        b'{"id": "x", "custom_id": 1, "error": null}',
        line(1).replace(b"req_1", b"req_%d" % 2**63),
    ],
)
def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path, corrupt: bytes) -> None:
    path = started(tmp_path / "out")
    lines = path.read_bytes().splitlines()
    lines[1] = corrupt
    damaged = b"\n".join(lines) + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match="line 2"):
        open_journal(path, JOB)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": \xff}',
        b'{"format": 1, "shard": 5}',
        b'{"format": 1, "shard": "x"}',
        b'{"format": 1, "input": 7}',
        b'{"format": 1, "input": "in\\u0000"}',
        b'{"format": 1, "errors": ["x"]}',
        b'{"format": 1, "errors": "\\ud800"}',
    ],
)
def test_an_unreadable_fingerprint_is_refused(tmp_path: Path, meta: bytes) -> None:
    path = started(tmp_path / "out")
    (tmp_path / "out.meta.json").write_bytes(meta)
    with pytest.raises(JournalError, match=r"out\.meta\.json"):
        open_journal(path, JOB)
    with pytest.raises(JournalError, match=r"out\.meta\.json"):
        read_status(path)
    with pytest.raises(JournalError, match=r"out\.meta\.json"):
        merge(tmp_path / "merged", [path], tmp_path / "in")


def test_places_that_cannot_hold_results(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no directory"):
        open_journal(tmp_path / "nowhere" / "out", JOB)
    with pytest.raises(JournalError, match="regular file"):
        open_journal(tmp_path, JOB)
    with pytest.raises(JournalError, match="regular file"):
        open_journal(Path("/dev/null"), JOB, overwrite=True)
    with pytest.raises(JournalError, match="cannot use"):
        open_journal(Path("/proc/out"), JOB)


def test_results_are_not_mixed_with_what_the_program_says(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path;"
        "from hpc_distkv.batch.results.opening import check_place;"
        "check_place(Path('/dev/stdout'), None)"
    )
    with (tmp_path / "words").open("wb") as words:
        ran = subprocess.run(
            [sys.executable, "-c", script], stdout=words, stderr=subprocess.PIPE, check=False
        )
    assert b"this program's own messages go there" in ran.stderr


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "link"):
        with pytest.raises(JournalError, match="both the input and the output"):
            open_journal(output, JOB, overwrite=True, source=source)
    assert source.read_bytes() == b"precious"


NOBODY = 65534


@pytest.fixture
def own_dir() -> Iterator[Path]:
    """A directory of an ordinary user, who the test runs as: root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() != 0:
            yield Path(name)
            return
        os.chown(name, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


def test_read_only_places(own_dir: Path) -> None:
    path = started(own_dir / "out")
    path.chmod(0o400)
    with pytest.raises(JournalError, match="denied"):
        open_journal(path, JOB)
    path.chmod(0o000)
    with pytest.raises(JournalError, match="denied"):
        open_journal(path, JOB)
    own_dir.chmod(0o500)
    with pytest.raises(JournalError, match="denied"):
        open_journal(own_dir / "new", JOB)
    own_dir.chmod(0o700)


def test_denied_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = started(tmp_path / "out")

    def denied(*args: Any, **kwargs: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    for place, overwrite in ((path, False), (path, True), (tmp_path / "new", False)):
        with pytest.raises(JournalError, match="Permission denied"):
            open_journal(place, JOB, overwrite=overwrite)


def test_a_full_disk_leaves_whole_lines_and_a_way_on(tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    sound = path.read_bytes()
    journal = open_journal(path, JOB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file size limit stops a write in its middle, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(sound) + 300, hard))
    try:
        journal.append(line(3) + b" " * 1000)
        with pytest.raises(JournalError, match=r"results so far are safe.*rerun the same command"):
            journal.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.close()
    assert path.read_bytes() == sound
    assert len(open_journal(path, JOB).answered.custom_ids) == 3


def test_a_failed_fsync_goes_back_to_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = started(tmp_path / "out")
    sound = path.read_bytes()
    journal = open_journal(path, JOB)
    journal.append(line(3))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left"):
            journal.commit()
    journal.close()
    assert path.read_bytes() == sound


def test_rows_that_cannot_be_put_in_order_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path / "out", JOB)
    for number in (1, 0):
        journal.append(line(number))
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(JournalError, match=r"all rows are in .*: No space left"):
            journal.close(InputOrder([]))
    assert (tmp_path / "out").read_bytes() == line(1) + b"\n" + line(0) + b"\n"
    open_journal(tmp_path / "out", JOB).close(InputOrder([]))
    assert (tmp_path / "out").read_bytes() == line(0) + b"\n" + line(1) + b"\n"


def test_a_second_run_on_one_file_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    first = open_journal(tmp_path / "out", JOB)
    first.append(line(0))
    with pytest.raises(JournalError, match=f"another run writes to .*: process {os.getpid()} on"):
        open_journal(tmp_path / "out", JOB)
    first.append(line(1))
    first.close()
    assert (tmp_path / "out").read_bytes() == line(0) + b"\n" + line(1) + b"\n"
    open_journal(tmp_path / "out", JOB).close()
    assert not claim_path(tmp_path / "out").exists()


def test_a_program_that_writes_to_the_file_is_noticed(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "out", JOB)
    with (tmp_path / "out").open("ab") as file:
        file.write(b"note\n")
    journal.append(line(0))
    with pytest.raises(JournalError, match="changed"):
        journal.commit()


def test_a_run_that_lost_its_claim_writes_nothing_more(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "out", JOB)
    claim_path(tmp_path / "out").unlink()
    other = open_journal(tmp_path / "out", JOB)
    journal.append(line(0))
    with pytest.raises(JournalError, match="taken over"):
        journal.commit()
    other.append(line(1))
    other.close()
    assert (tmp_path / "out").read_bytes() == line(1) + b"\n"


@pytest.mark.parametrize("how", ["file", "folder", "replaced", "removed"])
@pytest.mark.parametrize("when", ["before a write", "after the last one"])
def test_a_file_that_was_moved_or_removed_is_noticed(how: str, when: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    journal = open_journal(folder / "out", JOB)
    journal.append(line(0))
    journal.commit()
    if how == "folder":
        folder.rename(tmp_path / "elsewhere")
    elif how == "file":
        (folder / "out").rename(tmp_path / "elsewhere")
    else:
        (folder / "out").unlink()
    if how == "replaced":
        (folder / "out").write_bytes(line(0) + b"\n")
    if when == "before a write":
        journal.append(line(1))
    act = journal.commit if when == "before a write" else journal.close
    with pytest.raises(JournalError, match="was moved or removed by somebody else"):
        act()
    journal.release()


def test_a_run_whose_claim_was_removed_says_so(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "out", JOB)
    claim_path(tmp_path / "out").unlink()
    journal.append(line(0))
    with pytest.raises(JournalError, match=r"out\.claim was removed"):
        journal.commit()


def test_results_that_hold_a_row_twice_are_refused_with_the_lines(tmp_path: Path) -> None:
    path = started(tmp_path / "out")
    one = path.read_bytes()
    journal = open_journal(path, JOB)
    journal.append(line(3))
    journal.append(error_line(4, "row 0", RowError("twice", code="duplicate_custom_id")))
    journal.close()
    named, nameless = one.splitlines(keepends=True)[1], line(3) + b"\n"
    repeated = path.read_bytes().splitlines(keepends=True)[4]
    whole = path.read_bytes()
    for doubled, said in (
        (whole + named, "'row 1' has two lines, 2 and 6"),
        (whole + nameless, "line 4 of the input has two lines, 4 and 6"),
        (whole + repeated, "two lines, 5 and 6"),
        (whole + repeated.replace(b"req_4", b"req_4.1"), "two lines, 5 and 6"),
        (whole + whole, r"'row 0' has two lines, 1 and 6.*sort -u"),
        (whole + line(9, "row 2") + b"\n", "'row 2' has two lines, 3 and 6"),
    ):
        path.write_bytes(doubled)
        with pytest.raises(JournalError, match=said):
            open_journal(path, JOB)
        assert path.read_bytes() == doubled
    path.write_bytes(b"".join(sorted({*(whole + whole).splitlines(keepends=True)})))
    open_journal(path, JOB).close()
