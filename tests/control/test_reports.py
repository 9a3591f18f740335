"""Reports on the wire: what comes out is what went in, and what cannot be is refused by name."""

from __future__ import annotations

import contextlib
import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_reports import read, report

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import (
    COLUMNS,
    SIGNED,
    Changes,
    Large,
    Report,
    ReportError,
    Reports,
    encode_report,
)
from hpc_distkv.control.messages.requests import NOBODY, STEP_TOKENS, Result

counts = st.integers(0, 2**31 - 1)
FORMATS = {
    "?": st.booleans(),
    "q": st.integers(0, NOBODY),
    "f": st.floats(0, 2.0**99, width=32, allow_subnormal=False),
}
results = st.builds(
    Result, st.integers(0, NOBODY), st.binary(max_size=9), st.just("stop"), st.just(0.5), st.just(2)
)
changes = st.builds(
    Changes,
    st.none() | st.dictionaries(counts, counts, max_size=3),
    st.lists(results, max_size=2),
    st.lists(counts, max_size=2),
    st.none() | st.builds(Counters, counts, gaps=st.dictionaries(st.integers(-300, 99), counts)),
)
CODES = {name: code for code, names in COLUMNS.items() for name in names}
reports = st.builds(
    Report, **{name: FORMATS[code] for name, code in CODES.items()}, changes=changes
)


@given(st.lists(reports, max_size=4))
def test_columns_hold_what_was_reported(sent):
    received = read(*sent)
    assert len(received) == len(sent)
    for name in CODES:
        assert getattr(received, name).tolist() == [getattr(each, name) for each in sent]
    said = {i: each.changes for i, each in enumerate(sent) if each.changes != Changes()}
    assert received.changes == said


def test_a_report_without_changes_is_only_its_numbers():
    sizes = {"?": 1, "q": 8, "f": 4}
    message = encode_report(report())
    assert len(message) == sum(sizes[code] for code in CODES.values())


def test_columns_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        read(report(), report()).free[0] = 1


def test_a_steps_time_in_prompt_tokens_is_that_of_those_who_know():
    """Steps of 0.04 s and 0.08 s, and prompt tokens of 0.1 ms and 0.3 ms, in the mean."""
    fitted = {"fixed": 0.02, "per_token": 0.001, "per_kv": 1e-6, "running": 10}
    known = [
        report(**fitted, kv_tokens=10_000, prompt_time=1e-4),
        report(**fitted, kv_tokens=50_000, prompt_time=3e-4),
    ]
    measured = fitted | {"prompt_time": 0.5}
    unknown = [report(**measured | {name: 0}) for name in ("running", "fixed", "prompt_time")]
    assert read(*unknown, *known).step_tokens() == pytest.approx(300)
    assert read(*unknown).step_tokens() == STEP_TOKENS


def refuse(bad: Report, words: str) -> None:
    """The report of instance 1 of three is refused, and the error names it."""
    with pytest.raises(ReportError, match=rf"instance 1 .*{words}"):
        read(report(), bad, report()).check(0)


@given(reports, st.integers(0, 99))
def test_what_a_healthy_instance_sends_passes(sent, number):
    capacity = sent.capacity
    free = min(sent.free, capacity)
    changes = Changes(large=[Large(7, False, 0, 0, 0.0, 0.0)])
    healthy = msgspec.structs.replace(
        sent, round=number, free=free, promised=min(sent.promised, free), changes=changes
    )
    read(healthy).check(number)


@pytest.mark.parametrize("stale", [1, 3, NOBODY])
def test_a_report_of_another_round_is_refused(stale):
    refuse(report(stale), "stale")


@pytest.mark.parametrize("name", COLUMNS["q"])
def test_a_negative_number_is_refused(name):
    if name in SIGNED:
        read(report(**{name: -1})).check(0)
        refuse(report(**{name: -2}), f"{name} -2: negative")
    elif name == "round":
        refuse(report(-1), "stale")
    else:
        refuse(report(**{name: -1}), f"{name} -1: negative")


@pytest.mark.parametrize("name", COLUMNS["f"])
@pytest.mark.parametrize("value", [-0.001, math.nan, math.inf, -math.inf])
def test_a_time_that_is_none_is_refused(name, value):
    refuse(report(**{name: value}), f"{name} .*no time")


def test_more_free_than_there_is_and_more_promised_than_free_are_refused():
    refuse(report(free=11), "free 11: more than its pool")
    refuse(report(free=4, promised=5), "promised 5: more than is free")


@pytest.mark.parametrize(("debtor", "blocks"), [(3, 1), (-1, 1), (1, 1), (0, -1)])
def test_a_loan_that_cannot_be_is_refused(debtor, blocks):
    bad = report(changes=Changes(lent={debtor: blocks}))
    refuse(bad, f"a loan of {blocks} rBlocks to {debtor}")


@pytest.mark.parametrize("field", ["held", "blocks", "prompt", "output"])
@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
def test_a_large_row_that_cannot_be_is_refused(field, value):
    row = msgspec.structs.replace(Large(7, True, 1, 2, 3.0, 4.0), **{field: value})
    with pytest.raises(ReportError, match="instance 1 "):
        read(report(), report(changes=Changes(large=[row])), report()).check(0)


def test_the_first_bad_instance_is_named():
    with pytest.raises(ReportError, match="instance 2 "):
        read(report(), report(), report(wanted=-3), report(wanted=-9)).check(0)


@given(st.integers(1, len(encode_report(report()))))
def test_a_message_that_is_too_short_is_refused(missing):
    whole = encode_report(report())
    with pytest.raises(ReportError, match=r"instance 1 sent \d+ bytes, no report"):
        Reports.decode([whole, whole[:-missing]])


@pytest.mark.parametrize(
    "tail",
    [
        b"\x81",
        b"\xc1",
        msgspec.msgpack.encode("text"),
        msgspec.msgpack.encode([{"a": 1}]),
        msgspec.msgpack.encode([None, [[0, 1]]]),
        msgspec.msgpack.encode(Changes(adopted=[1])) + b"\x00",
        msgspec.msgpack.encode(Changes(adopted=[300, 300]))[:-1],
    ],
)
def test_malformed_changes_are_refused(tail):
    whole = encode_report(report())
    with pytest.raises(ReportError, match="instance 1 is malformed"):
        Reports.decode([whole, whole + tail])


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_be_read_or_refused(noise):
    with contextlib.suppress(ReportError):
        Reports.decode([noise]).check(0)


def test_a_number_beyond_its_column_does_not_wrap_around():
    with pytest.raises(struct.error):
        encode_report(report(free=2**63))
