"""Error rows apart or answered again, results in order, shards, and what `status` counts."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from batch_fakes import (
    MIXED,
    MIXED_ROWS,
    answer,
    completion,
    make_service,
    open_journal,
    read_lines,
    write_lines,
)
from click.testing import CliRunner

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.results.claim import Claim
from hpc_distkv.batch.results.journal import Journal
from hpc_distkv.batch.results.opening import Opening, Reuse
from hpc_distkv.batch.status import read_status
from hpc_distkv.cli.group import group


def run(
    folder: Path,
    *,
    name: str = "out",
    errors: str | None = None,
    retry: bool = False,
    ordered: bool = False,
    shard: Shard | None = None,
    most: int | None = None,
    shuffle: int | None = None,
) -> Job:
    """A run over `folder`/in; `most`: answers after which it is stopped."""
    service = make_service()
    fingerprint = job_fingerprint("f00d", "tiny", service.defaults, shard)

    def journal(path: Path) -> Journal:
        apart = folder / errors if errors and path.name == name else None
        source = folder / "in"
        return open_journal(path, fingerprint, retry_errors=retry, source=source, errors=apart)

    job = Job(
        Intake(folder / "in", shard),
        journal(folder / name),
        service,
        journal(folder / errors) if errors else None,
    )
    requests = list(job.requests())
    if shuffle is not None:
        random.Random(shuffle).shuffle(requests)
    for request in requests[:most]:
        job.finish(answer(request))
    job.close(ordered)
    return job


def numbers(path: Path) -> list[int]:
    return [int(line["id"].rpartition("_")[2]) for line in read_lines(path)]


def test_error_rows_go_to_a_file_of_their_own_and_count_in_a_rerun(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", MIXED)
    first = run(tmp_path, errors="errors")
    assert (first.answered, first.failed) == (3, 7)
    assert {line["error"] for line in read_lines(tmp_path / "out")} == {None}
    assert {bool(line["error"]) for line in read_lines(tmp_path / "errors")} == {True}
    again = run(tmp_path, errors="errors")
    assert (again.answered, again.failed, again.failed_before) == (0, 0, 7)
    assert again.skipped == MIXED_ROWS


@pytest.mark.parametrize("errors", [None, "errors"])
def test_retried_rows_are_answered_once_when_the_input_is_mended(
    errors: str | None, tmp_path: Path
) -> None:
    rows = [completion(str(i), "hello", temperature=9 if i % 3 == 0 else 0) for i in range(9)]
    write_lines(tmp_path / "in", rows)
    assert run(tmp_path, errors=errors).failed == 3
    write_lines(tmp_path / "in", [completion(str(i), "hello", temperature=0) for i in range(9)])
    assert run(tmp_path, errors=errors).answered == 0
    again = run(tmp_path, errors=errors, retry=True)
    assert (again.answered, again.failed, again.failed_before) == (3, 0, 0)
    lines = read_lines(tmp_path / "out")
    assert sorted(line["custom_id"] for line in lines) == [str(i) for i in range(9)]
    assert {line["error"] for line in lines} == {None}
    assert not errors or (tmp_path / errors).read_bytes() == b""


def test_links_stay_and_what_belongs_to_a_file_lies_beside_the_file(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("out", "errors"):
        (tmp_path / name).symlink_to(scratch / name)
    rows = [completion(str(i), "hello", temperature=9 if i % 3 == 0 else 0) for i in range(9)]
    write_lines(tmp_path / "in", rows)
    assert run(tmp_path, errors="errors", shuffle=1, ordered=True).failed == 3
    write_lines(tmp_path / "in", [completion(str(i), "hello", temperature=0) for i in range(9)])
    assert run(tmp_path, errors="errors", retry=True, ordered=True).answered == 3
    assert {path.name for path in tmp_path.iterdir() if path.is_symlink()} == {"out", "errors"}
    assert numbers(scratch / "out") == list(range(9))
    assert (scratch / "errors").read_bytes() == b""
    metas = {"out.meta.json", "errors.meta.json"}
    assert {path.name for path in scratch.iterdir()} == {"out", "errors"} | metas
    assert read_status(tmp_path / "out").left == read_status(scratch / "out").left == 0
    (scratch / "in").symlink_to(tmp_path / "in")
    assert run(scratch, errors="errors", retry=True).answered == 0


@pytest.mark.parametrize("wrong", ["a foreign line", "unfinished rows", "another error file"])
def test_to_look_whether_a_file_can_be_used_changes_nothing(wrong: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a"), completion("b", temperature=9)])
    run(tmp_path, errors="errors")
    errors: Path | None = tmp_path / "errors"
    if wrong == "a foreign line":
        (tmp_path / "out").write_bytes(b"not ours\n" + (tmp_path / "out").read_bytes())
    elif wrong == "unfinished rows":
        (tmp_path / "out.unfinished.jsonl").write_text("not ours")
    else:
        errors = None
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    fingerprint = job_fingerprint("f00d", "tiny", make_service().defaults)
    retry = Reuse(retry_errors=True)
    with Claim.take(tmp_path / "errors") as claim, Claim.take(tmp_path / "out") as other:
        Opening.look(claim, fingerprint, retry)
        with pytest.raises(JournalError):
            Opening.look(other, fingerprint, retry, errors=errors)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_at_the_end_results_are_put_into_the_order_of_the_input(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i), "x" * (i % 7)) for i in range(50)])
    run(tmp_path, ordered=True, shuffle=1, most=30)
    unordered = numbers(tmp_path / "out")
    assert unordered != sorted(unordered), "a stopped job is not put in order"
    before = sorted((tmp_path / "out").read_bytes().splitlines())
    run(tmp_path, ordered=True, shuffle=2)
    assert numbers(tmp_path / "out") == list(range(50))
    assert set(before) <= set((tmp_path / "out").read_bytes().splitlines())
    inode = (tmp_path / "out").stat().st_ino
    run(tmp_path, ordered=True)
    assert (tmp_path / "out").stat().st_ino == inode, "what is in order is left alone"


def test_every_row_is_in_one_shard_and_duplicates_are_found(tmp_path: Path) -> None:
    names = [f"row {i}" for i in range(40)]
    rows = [completion(name) for name in names] + [completion(name) for name in names[:5]]
    write_lines(tmp_path / "in", [*rows, b"broken", completion(None)])
    lines = []
    for index in (1, 2, 3):
        run(tmp_path, name=f"out.{index}", shard=Shard(index, 3))
        lines += read_lines(tmp_path / f"out.{index}")
    assert sorted(int(line["id"].rpartition("_")[2]) for line in lines) == list(range(47))
    good = [line["custom_id"] for line in lines if line["error"] is None]
    assert sorted(good) == sorted(names)
    codes = [line["error"]["code"] for line in lines if line["error"]]
    assert codes.count("duplicate_custom_id") == 5


def test_results_of_another_shard_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(9)])
    run(tmp_path, shard=Shard(1, 2))
    with pytest.raises(JournalError, match='shard was "1/2", now "2/2"'):
        run(tmp_path, shard=Shard(2, 2))


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "a/b", "1/0", "-1/3", ""])
def test_what_is_no_shard_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="--shard 1/8"):
        Shard.parse(text)


def show(*words: str | Path) -> tuple[int, dict[str, str]]:
    ran = CliRunner().invoke(group, ["status", *map(str, words)])
    return ran.exit_code, dict(line.split(maxsplit=1) for line in ran.output.splitlines())


def test_status_counts_what_the_files_say(tmp_path: Path) -> None:
    rows = [completion(str(i), "hello", max_tokens=3) for i in range(9)]
    write_lines(tmp_path / "in", [*rows, completion("bad", temperature=9)])
    run(tmp_path, errors="errors", most=4)
    usages = [line["response"]["body"]["usage"] for line in read_lines(tmp_path / "out")]
    tokens = (
        f"{sum(usage['prompt_tokens'] for usage in usages)} in prompts, "
        f"{sum(usage['completion_tokens'] for usage in usages)} in outputs"
    )
    code, said = show(tmp_path / "out", "--error-file", tmp_path / "errors")
    assert code == 75
    assert said == {"done": "4", "failed": "1", "left": "5", "tokens": tokens}
    run(tmp_path, errors="errors")
    code, said = show(tmp_path / "out")
    assert (code, said["done"], said["left"]) == (1, "9", "0")
    (tmp_path / "in").rename(tmp_path / "moved")
    code, said = show(tmp_path / "out")
    assert (code, said["left"].partition(":")[0]) == (2, "unknown")
    assert show(tmp_path / "out", "-i", tmp_path / "moved")[1]["left"] == "0"


def test_status_of_a_running_job_changes_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion(str(i)) for i in range(3)])
    journal = open_journal(tmp_path / "out", {}, source=tmp_path / "in")
    (tmp_path / "out").write_bytes(torn := b'{"id":"batch_r')
    found = read_status(tmp_path / "out")
    assert (found.answered.lines, found.left) == (0, 3)
    assert found.owner is not None
    assert found.owner.pid == os.getpid()
    assert (tmp_path / "out").read_bytes() == torn
    assert json.loads((tmp_path / "out.meta.json").read_text())["input"] == str(tmp_path / "in")
    del journal


def test_status_of_nothing_is_a_usage_error(tmp_path: Path) -> None:
    ran = CliRunner().invoke(group, ["status", str(tmp_path / "none")])
    assert ran.exit_code == 2
    assert "cannot read" in ran.output
