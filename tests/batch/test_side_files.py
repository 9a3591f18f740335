"""What a job keeps beside its files is its own, and nothing else is."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import completion, make_service, run_job, write_lines

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.job import Job
from hpc_distkv.batch.line_index import LineIndex
from hpc_distkv.batch.results import claim as claim_module
from hpc_distkv.batch.results.claim import Claim, read_claim
from hpc_distkv.batch.results.files import Files
from hpc_distkv.batch.results.meta import read_meta
from hpc_distkv.batch.results.order import InputOrder, order_lines
from hpc_distkv.batch.results.side_files import is_side_file, side_files
from hpc_distkv.batch.results.unfinished import check_unfinished, read_unfinished
from hpc_distkv.batch.status import read_status
from hpc_distkv.regular import replace_file, replacing, temporary_path

LASTING = [".meta.json", ".claim", ".unfinished.jsonl"]
SUFFIXES = LASTING + [lasting + ".hpc-distkv-0123456789abcdef.tmp" for lasting in ("", *LASTING)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module.time, "sleep", lambda seconds: None)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def by_name(path: Path) -> Path:
    return path


def by_dots(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


def by_symbolic_link(path: Path) -> Path:
    (path.parent / "link").symlink_to(path)
    return path.parent / "link"


def by_hard_link(path: Path) -> Path:
    os.link(path, path.parent / "link")
    return path.parent / "link"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("way", [by_name, by_dots, by_symbolic_link])
def test_an_input_that_is_a_side_file_is_refused(
    suffix: str, way: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = tmp_path / ("out" + suffix)
    write_lines(source, [completion("a")])
    source = way(source)
    before = content(tmp_path)
    for files in (
        Files(source, tmp_path / "out"),
        Files(source, tmp_path / "results", errors=tmp_path / "out", overwrite=True),
    ):
        with pytest.raises(JournalError, match=r"in its way|a name that this program"):
            files.claim()
        assert content(tmp_path) == before


def test_a_hard_link_to_a_side_file_is_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    run_job(tmp_path / "in", tmp_path / "out")
    linked = by_hard_link(tmp_path / "out.meta.json")
    assert is_side_file(linked, tmp_path / "out")
    with pytest.raises(JournalError, match="a name that this program uses"):
        Files(tmp_path / "in", tmp_path / "out", errors=linked).claim()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_results_and_error_rows_are_not_each_other_s_side_files(
    suffix: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    one, other = tmp_path / "out", tmp_path / ("out" + suffix)
    before = content(tmp_path)
    for output, errors in ((one, other), (other, one)):
        with pytest.raises(JournalError, match="a name that this program uses"):
            Files(tmp_path / "in", output, errors=errors).claim()
    assert content(tmp_path) == before
    assert Files(tmp_path / "in", one).hold(other)
    assert Files(tmp_path / "in", tmp_path / "new", errors=one).hold(other)
    assert not Files(tmp_path / "in", tmp_path / "new").hold(other)


@pytest.mark.parametrize("suffix", LASTING)
@pytest.mark.parametrize("kind", ["notes", "folder", "pipe", "link"])
def test_what_another_program_left_at_a_side_file_s_place_is_kept(
    suffix: str, kind: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    place = tmp_path / ("out" + suffix)
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "link":
        (tmp_path / "notes").write_bytes(b"precious\n")
        place.symlink_to(tmp_path / "notes")
    else:
        place.write_bytes(b'{"note": "precious"}\n')
    before = content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(JournalError, match=place.name):
            run_job(tmp_path / "in", tmp_path / "out", overwrite=overwrite)
        assert content(tmp_path) == before
        assert place.is_symlink() == (kind == "link")


@pytest.mark.parametrize("damage", [b"\xff", b"[" * 9999])
def test_damaged_side_files_are_named_and_end_nothing_by_surprise(
    damage: bytes, tmp_path: Path
) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    run_job(tmp_path / "in", tmp_path / "out")
    _, claim, unfinished = side_files(tmp_path / "out")
    claim.write_bytes(b'{"host":"' + damage)
    assert read_claim(tmp_path / "out") is None
    assert read_status(tmp_path / "out").owner is None
    with Claim.take(tmp_path / "out", lambda _: None) as ours:
        claim.write_bytes(b'{"host":"' + damage)
        with pytest.raises(JournalError, match="taken over"):
            ours.check()
    claim.unlink()
    unfinished.write_bytes(b'{"custom_id":"' + damage)
    with pytest.raises(JournalError, match=r"out\.unfinished\.jsonl does not hold"):
        run_job(tmp_path / "in", tmp_path / "out")
    with pytest.raises(JournalError, match=r"out\.unfinished\.jsonl does not hold"):
        read_status(tmp_path / "out")
    with pytest.raises(JournalError, match=r"out\.unfinished\.jsonl is not this program's"):
        run_job(tmp_path / "in", tmp_path / "out", overwrite=True)


def test_no_reader_waits_for_a_pipe_at_a_side_file_s_place(tmp_path: Path) -> None:
    """Whoever looks without `check_place` before, or before the pipe came."""
    write_lines(tmp_path / "in", [completion("a")])
    run_job(tmp_path / "in", tmp_path / "out")
    meta, claim, unfinished = side_files(tmp_path / "out")
    os.mkfifo(claim)
    assert read_claim(tmp_path / "out") is None
    with pytest.raises(JournalError, match="not a regular file"):
        Claim.take(tmp_path / "out")
    os.mkfifo(unfinished)
    for read in (read_unfinished, check_unfinished):
        with pytest.raises(OSError, match="not a regular file"):
            read(unfinished)
    with pytest.raises(JournalError, match=r"out\.unfinished\.jsonl: it is not a regular file"):
        read_status(tmp_path / "out")
    with pytest.raises(OSError, match="not a regular file"):
        LineIndex([unfinished])
    meta.unlink()
    os.mkfifo(meta)
    with pytest.raises(OSError, match="not a regular file"):
        read_meta(tmp_path / "out")


def test_a_name_too_long_for_side_files_is_refused_at_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    with pytest.raises(JournalError, match="shorten its name by 1 bytes"):
        Files(tmp_path / "in", tmp_path / ("x" * 207)).claim()
    run_job(tmp_path / "in", tmp_path / ("x" * 206))


def test_temporary_files_are_new_and_have_the_mode_they_should(tmp_path: Path) -> None:
    path = tmp_path / "out"
    seen = []
    with replacing(path) as file:
        (fresh,) = tmp_path.iterdir()
        assert fresh.name.startswith("out.hpc-distkv-")
        file.write(b"new")
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "other", [b""])
    finally:
        os.umask(old)
    seen.append(stat.S_IMODE((tmp_path / "other").stat().st_mode))
    for mode in (0o600, 0o664):
        path.chmod(mode)
        replace_file(path, [b"newer"])
        seen.append(stat.S_IMODE(path.stat().st_mode))
    assert seen == [0o640, 0o600, 0o664]


def test_a_link_laid_in_the_way_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    temporary_path(tmp_path / "out").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "out", [b"new"])
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_what_a_killed_run_left_is_removed_by_the_next_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in", [completion("a")])
    out = tmp_path / "out"
    ours = [temporary_path(path) for path in (out, *side_files(out))]
    others = [temporary_path(tmp_path / "other"), tmp_path / "out.tmp", tmp_path / "out.x.tmp"]
    others += [tmp_path / "out.hpc-distkv-0123.tmp"]
    for path in (*ours, *others):
        path.write_bytes(b"?")
    os.utime(ours[2], (0, 0))
    young = temporary_path(side_files(out)[1])
    young.write_bytes(b"of a run that is about to take over the claim")
    folder = temporary_path(out)
    folder.mkdir()
    link = temporary_path(out)
    link.symlink_to(tmp_path / "in")
    Files(tmp_path / "in", out).claim().release()
    assert set(tmp_path.iterdir()) == {tmp_path / "in", young, folder, link, *others}


def test_ordering_keeps_the_mode_and_takes_an_empty_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [])
    run_job(tmp_path / "in", tmp_path / "out")
    order_lines(tmp_path / "out", InputOrder([]))
    write_lines(tmp_path / "in", [completion("b"), completion("a")])
    run_job(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out").chmod(0o600)
    write_lines(tmp_path / "in", [completion("a"), completion("b")])
    intake = Intake(tmp_path / "in")
    order_lines(tmp_path / "out", InputOrder(intake.again()))
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600
    assert b'"a"' in (tmp_path / "out").read_bytes().splitlines()[0]


def test_a_row_in_both_files_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", temperature=9)])

    def run(**options: Any) -> Job:
        files = Files(tmp_path / "in", tmp_path / "out", errors=tmp_path / "errors", **options)
        claims = files.claim()
        try:
            results, errors = files.open(claims, {})
        except JournalError:
            claims.release()
            raise
        job = Job(Intake(tmp_path / "in"), results, make_service(), errors)
        _drain(job.requests())
        job.close()
        return job

    run()
    (tmp_path / "out").write_bytes((tmp_path / "errors").read_bytes())
    with pytest.raises(JournalError, match=r"1 rows have a line in .* such as 'a'"):
        run()
    assert run(retry_errors=True).failed == 1


def _drain(items: Iterator[Any]) -> None:
    for _ in items:
        pass
