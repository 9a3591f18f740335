"""Long ways to the next row are cut into pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_fakes import completion, make_service, open_journal, run_job, write_lines
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.pauses import with_pauses

LIMIT = 5

lists = st.lists(st.tuples(st.one_of(st.none(), st.just("row")), st.integers(0, 12)))
"""What comes, and the seconds that it takes."""


@given(lists, st.integers(0, 100))
def test_a_pause_comes_as_soon_as_the_items_took_so_long(items, between):
    now = 0.0

    def source() -> Iterator[str | None]:
        nonlocal now
        for item, seconds in items:
            now += seconds
            yield item

    expected: list[str | None] = []
    spent = 0
    for item, seconds in items:
        spent += seconds
        expected += [item] if item else []
        if spent >= LIMIT:
            expected.append(None)
            spent = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        found = []
        for item in with_pauses(source(), LIMIT):
            found.append(item)
            now += between
    assert found == expected


@pytest.mark.parametrize("bad", [False, True], ids=["answered", "errors"])
def test_no_row_that_makes_no_request_holds_up_who_waits_for_one(tmp_path: Path, bad: bool) -> None:
    fields = {"n": 0} if bad else {}
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, [completion(str(number), **fields) for number in range(20)])
    if not bad:
        run_job(source, output)
    write_lines(source, [completion(str(n), **fields) for n in range(20)] + [completion("last")])
    service = make_service()
    fingerprint = job_fingerprint("f00d", service.model_names[0], service.defaults)
    job = Job(Intake(source), open_journal(output, fingerprint, source=source), service)
    *pauses, last, _ = job.requests(pause=0.0)
    assert pauses == [None] * 20
    assert last is not None
    assert (job.skipped, job.failed) == ((0, 20) if bad else (20, 0))
