"""An input that is not what it was when rows of it were answered, or is not whole yet."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from batch_fakes import answer, chat, completion, make_service, read_lines, write_lines
from click.testing import CliRunner
from openai.types.chat import ChatCompletion

from hpc_distkv.batch.input import envelope
from hpc_distkv.batch.input.envelope import read_envelope, request_digest
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.results.answered import CompactSet
from hpc_distkv.batch.results.files import Files
from hpc_distkv.batch.results.order import InputOrder
from hpc_distkv.batch.status import read_status
from hpc_distkv.cli.group import group


def run(
    folder: Path, rows: Sequence[Any] | None = None, most: int | None = None, **files: Any
) -> Job:
    """A run over `folder`/in, made of `rows` if they are given, as `generate` opens it; answers
    come in no order. `most`: answers after which it is stopped."""
    if rows is not None:
        write_lines(folder / "in", rows)
    service = make_service()
    whole = Files(folder / "in", folder / "out", **files)
    fingerprint = job_fingerprint("f00d", "tiny", service.defaults, whole.shard)
    results, errors = whole.open(whole.claim(), fingerprint)
    job = Job(Intake(folder / "in", whole.shard), results, service, errors)
    requests = list(job.requests())
    random.Random(0).shuffle(requests)
    for request in requests[:most]:
        job.finish(answer(request))
    job.close(whole.ordered)
    return job


def names(path: Path) -> list[str | None]:
    return [line["custom_id"] for line in read_lines(path)]


def ids(path: Path) -> list[str]:
    """All that must be unique in a results file."""
    lines = read_lines(path)
    bodies = [line["response"]["body"].get("id") for line in lines]
    requests = [line["response"]["request_id"] for line in lines]
    return [*(line["id"] for line in lines), *requests, *(each for each in bodies if each)]


def rows_named(prefix: str, count: int) -> list[dict[str, Any]]:
    return [completion(f"{prefix}{i}", f"hello {i}") for i in range(count)]


def test_ordered_results_stand_in_the_order_of_the_input_as_it_is_now(tmp_path: Path) -> None:
    x, y, z = (rows_named(name, 3) for name in "xyz")
    run(tmp_path, x, ordered=True)
    assert names(tmp_path / "out") == ["x0", "x1", "x2"]
    run(tmp_path, [*y, *x], ordered=True)
    assert names(tmp_path / "out") == ["y0", "y1", "y2", "x0", "x1", "x2"]
    run(tmp_path, [z[0], *x[::-1], z[1], *y], ordered=True)
    expected = ["z0", "x2", "x1", "x0", "z1", "y0", "y1", "y2"]
    assert names(tmp_path / "out") == expected
    job = run(tmp_path, [*y, *x[1:]], ordered=True)
    assert names(tmp_path / "out") == ["y0", "y1", "y2", "x1", "x2", "z0", "x0", "z1"]
    assert job.left_over == 3, "rows that are gone keep their lines, behind the others"
    assert job.names_left_over == ["x0", "z0", "z1"]
    assert set(Counter(ids(tmp_path / "out")).values()) == {1}


def test_error_rows_are_ordered_and_found_again_when_rows_come_before_them(tmp_path: Path) -> None:
    rows = [
        completion("a", "first"),
        b"broken",
        completion("a", "again"),
        b"broken",
        b'{"no": "id"}',
    ]
    run(tmp_path, rows, errors=tmp_path / "errors")
    assert len(read_lines(tmp_path / "errors")) == 4
    moved = [completion("new"), b"new and broken", *rows[::-1]]
    job = run(tmp_path, moved, errors=tmp_path / "errors", ordered=True)
    assert (job.answered, job.failed, job.left_over) == (1, 1 + 1, 1)
    # The row that comes first now was a repetition, and the one that was answered repeats it.
    again = run(tmp_path, moved, errors=tmp_path / "errors")
    assert (again.answered, again.failed, again.left_over) == (0, 0, 1)
    both = ids(tmp_path / "out") + ids(tmp_path / "errors")
    assert set(Counter(both).values()) == {1}
    said = [line["error"]["message"] for line in read_lines(tmp_path / "errors")]
    assert said[0].startswith("Line 2 of the input")
    assert names(tmp_path / "out") == ["new", "a"]


def test_whatever_becomes_of_the_input_each_row_has_a_line_and_no_two_lines_one_id(
    tmp_path: Path,
) -> None:
    rng = random.Random(1)
    rows: list[Any] = []
    for leg in range(12):
        fresh = [*rows_named(f"{leg}.", 5), b"broken %d" % leg, completion(None), completion("0.1")]
        for row in fresh:
            rows.insert(rng.randrange(len(rows) + 1), row)
        run(tmp_path, rows, most=rng.randrange(8))
    job = run(tmp_path, rows, ordered=True)
    lines = read_lines(tmp_path / "out")
    assert set(Counter(ids(tmp_path / "out")).values()) == {1}
    asked = [read_envelope(json.dumps(r).encode() if isinstance(r, dict) else r, 0) for r in rows]
    wanted = [row.custom_id for row in asked]
    got = [line["custom_id"] for line in lines][: len(wanted)]
    assert got == wanted
    assert len(lines) == len(rows) + (job.left_over or 0)


def test_lines_of_the_version_before_are_resumed_by_their_numbers(tmp_path: Path) -> None:
    rows = [completion("a"), b"broken", completion("a", "again"), completion("b")]
    run(tmp_path, rows)
    lines = read_lines(tmp_path / "out")
    for line in lines:
        del line["request_digest"]
    write_lines(tmp_path / "out", lines)
    job = run(tmp_path, [*rows, completion("c")])
    assert (job.answered, job.failed, job.skipped, job.left_over) == (1, 0, 4, 0)
    write_lines(tmp_path / "in", [completion("a", "edited"), *rows[1:]])
    assert not run(tmp_path, retry_changed=True).answered, "nobody knows what was asked"


def test_the_digest_is_of_the_request_and_not_of_how_it_is_written() -> None:
    body = {"prompt": "é\n", "max_tokens": 3, "stop": ["a", "b"]}
    ways = [
        json.dumps(body),
        json.dumps(body, ensure_ascii=False, indent=1),
        json.dumps(dict(reversed(body.items())), separators=(",", ":")),
    ]
    assert len({request_digest(way.encode(), "/v1/completions") for way in ways}) == 1
    spelled = [b"[1, 100, 0, 2.5, 10000000000000000]", b"[1.0, 1e2, -0.0, 2.50, 1E16]"]
    assert len(set(map(request_digest, spelled))) == 1, "as JavaScript and jq write numbers"
    large = [b"1e30", b"1e31", b"1.0000000000000002", b"1e999", b"1e998", b"null"]
    assert len(set(map(request_digest, large))) == len(large)
    edited = [{**body, "max_tokens": 4}, {**body, "stop": ["b", "a"]}, {**body, "prompt": "e\n"}]
    digests = {request_digest(json.dumps(each).encode()) for each in (body, *edited)}
    assert len(digests) == 4
    assert request_digest(b"{}", "/v1/completions") != request_digest(b"{}", "/v1/chat/completions")
    strange = [b"", b"{", b"[" * 9999, b'{"n": 1%s}' % (b"0" * 5000), b'"\\ud800"', b"\xff"]
    assert len({request_digest(each) for each in strange}) == len(strange)


def test_nobody_computes_a_digest_that_nobody_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are known by custom_id: the order of the input, and rows of other shards."""
    write_lines(tmp_path / "in", rows_named("r", 40))
    job = run(tmp_path, shard=Shard(1, 2))
    digest = mock.Mock(side_effect=request_digest)
    monkeypatch.setattr(envelope, "request_digest", digest)
    InputOrder(Intake(tmp_path / "in").again())
    assert not digest.called
    assert read_status(tmp_path / "out").left == 0
    assert digest.call_count == job.answered, "status says whether these were edited"
    digest.reset_mock()
    run(tmp_path, shard=Shard(2, 2), overwrite=True)
    assert digest.call_count == 40 - job.answered


def test_edited_rows_are_counted_and_answered_again_when_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*rows_named("r", 8), completion("bad", temperature=9), chat("c")]
    run(tmp_path, rows, errors=tmp_path / "errors")
    before = {line["custom_id"]: line for line in read_lines(tmp_path / "out")}
    ChatCompletion.model_validate(before["c"]["response"]["body"])
    edited = [*rows_named("r", 4), *(completion(f"r{i}", "edited") for i in range(4, 8))]
    edited += [completion("bad", temperature=0), chat("c")]
    write_lines(
        tmp_path / "in", [json.dumps(row, indent=None, sort_keys=True).encode() for row in edited]
    )
    with caplog.at_level(logging.WARNING):
        job = run(tmp_path, errors=tmp_path / "errors")
    assert (job.answered, job.failed) == (0, 0)
    assert "5 rows of" in caplog.text
    assert "--retry-changed answers them again" in caplog.text
    assert "'r4', 'r5', 'r6', …" in caplog.text
    job = run(tmp_path, errors=tmp_path / "errors", retry_changed=True, most=2, job="7")
    assert (job.answered, job.answered_before, job.failed_before) == (2, 5, 0)
    requeued = {"retry_changed": True, "job": "7", "restarted": True}
    job = run(tmp_path, errors=tmp_path / "errors", **requeued)
    assert (job.answered, job.answered_before) == (3, 7)
    after = {line["custom_id"]: line for line in read_lines(tmp_path / "out")}
    assert after.keys() == {row["custom_id"] for row in edited}
    assert {name for name in before if before[name] == after[name]} == {"r0", "r1", "r2", "r3", "c"}
    texts = {after[f"r{i}"]["response"]["body"]["choices"][0]["text"] for i in range(4, 8)}
    assert texts == {"detide"}, "the fake engine gives the prompt backwards"
    caplog.clear()
    assert not run(tmp_path, errors=tmp_path / "errors", retry_changed=True).answered
    assert not caplog.text


def test_only_the_first_row_of_a_custom_id_can_be_one_that_was_edited(tmp_path: Path) -> None:
    rows = [completion("a", "one"), completion("a", "two")]
    run(tmp_path, rows)
    assert run(tmp_path, rows, retry_changed=True).answered == 0
    assert run(tmp_path, [completion("a", "three"), rows[1]], retry_changed=True).answered == 1
    assert names(tmp_path / "out") == ["a", "a"]


@pytest.mark.parametrize("cut", [1, 30, 100, -1])
def test_an_input_that_ends_within_a_line_is_answered_when_it_is_whole(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = b"".join(json.dumps(completion(name, "é" * 9)).encode() + b"\n" for name in "abc")
    third = whole.rindex(b"\n", 0, -1) + 1
    end = third + cut if cut > 0 else len(whole) - 2
    (tmp_path / "in").write_bytes(whole[:end])
    with caplog.at_level(logging.WARNING):
        job = run(tmp_path, ordered=True)
    assert (job.answered, job.failed, job.complete, job.torn) == (2, 0, False, True)
    assert "is it still being copied?" in caplog.text
    (tmp_path / "in").write_bytes(whole[:-1])
    job = run(tmp_path, ordered=True)
    assert (job.answered, job.failed, job.complete, job.torn) == (1, 0, True, False)
    assert names(tmp_path / "out") == [*"abc"]


@pytest.mark.parametrize("how", ["grows", "shrinks", "is replaced", "is written anew"])
def test_a_job_whose_input_changes_meanwhile_is_to_be_run_again(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "in", rows_named("r", 3))
    service = make_service()
    files = Files(tmp_path / "in", tmp_path / "out")
    results, _ = files.open(files.claim(), {})
    job = Job(Intake(tmp_path / "in"), results, service)
    for request in job.requests():
        job.finish(answer(request))
    rows: list[Any] = rows_named("r", 4)
    if how == "is replaced":
        write_lines(tmp_path / "other", rows)
        (tmp_path / "other").replace(tmp_path / "in")
    else:
        write_lines(
            tmp_path / "in", rows if how == "grows" else rows[: 2 if how == "shrinks" else 3]
        )
    with caplog.at_level(logging.WARNING):
        job.close()
    assert (job.complete, job.torn) == (False, False)
    assert "was changed while it was read" in caplog.text
    assert len(read_lines(tmp_path / "out")) == 3


def test_status_counts_what_is_not_in_the_input_any_more(tmp_path: Path) -> None:
    rows = [*rows_named("r", 6), b"broken", completion("r0", "again")]
    run(tmp_path, rows)
    answered = read_status(tmp_path / "out").answered
    assert answered.left_over == 0
    write_lines(tmp_path / "in", rows[2:])
    answered = read_status(tmp_path / "out").answered
    assert answered.left_over == 2, "r1, and a line too many of r0, which came twice"
    assert CliRunner().invoke(group, ["status", str(tmp_path / "out")]).exit_code in (1, 75)


@pytest.mark.parametrize("code", ["q", "I"])
def test_a_compact_set_has_what_was_added(code: str) -> None:
    rng = random.Random(0)
    low = -(2**63) if code == "q" else 0
    values = {rng.randrange(low, 2**31) for _ in range(500)}
    found = CompactSet(code)
    assert 3 not in found
    for value in values:
        found.add(value)
    assert all(value in found for value in values)
    others = {rng.randrange(low, 2**31) for _ in range(500)}
    other = CompactSet(code)
    for value in others:
        other.add(value)
    found.include(other)
    for value in [*others, *(rng.randrange(low, 2**31) for _ in range(500))]:
        assert (value in found) == (value in values | others)
