"""No line, however mangled, stops a job or loses its row."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from batch_fakes import chat, completion, make_service, run_job, summaries, write_lines
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input import unsupported
from hpc_distkv.batch.input.body import ChatBody, CompletionBody
from hpc_distkv.batch.input.envelope import read_envelope
from hpc_distkv.batch.input.not_jsonl import problem_of
from hpc_distkv.batch.input.rows import parse_row, which_choice

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("custom_id", "method", "url", "body", "prompt", "messages", "nonsense"),
        *ChatBody.__struct_fields__,
        *CompletionBody.__struct_fields__,
        *unsupported.CHAT,
        *unsupported.IGNORED,
    ]
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A good row with some of its fields and bytes replaced; or just bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60)).replace(b"\n", b"")
    make = draw(st.sampled_from([chat, completion]))
    row = make(draw(st.text(max_size=3)), draw(JSON | st.text(max_size=8)))
    for name, value in draw(st.lists(st.tuples(FIELDS, JSON), max_size=3)):
        (row if name in row else row["body"])[name] = value
        if not isinstance(row["body"], dict):
            break
    line = bytearray(json.dumps(row, ensure_ascii=draw(st.booleans())).encode(errors="replace"))
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2)
    ):
        line[place % len(line)] = value
    if draw(st.integers(0, 9)) == 0:
        del line[draw(st.integers(0, len(line) - 1)) :]
    return bytes(line).replace(b"\n", b"")


@settings(max_examples=2000, deadline=None)
@given(lines())
def test_no_line_raises_anything_but_a_row_error(line: bytes) -> None:
    try:
        row = parse_row(read_envelope(line, 0), make_service())
    except RowError:
        return
    assert [which_choice(r.id)[1] for r in row.requests()] == [*range(row.choices)]
    assert 0 < len(row.prompt) < len(row.prompt) + row.sampling.max_tokens <= 100


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(lines(), max_size=20), st.randoms(use_true_random=False))
def test_random_inputs_with_random_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[bytes], rng: random.Random
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    source, output = tmp_path / "in", tmp_path / "out"
    write_lines(source, rows)
    with source.open("rb") as file:
        assume(problem_of(file.fileno()) is None)  # refused whole
    run_job(source, output, overwrite=True)
    expected = summaries(output)
    begin = b"".join(rows[:1]).removeprefix(b"\xef\xbb\xbf")
    lines = enumerate([begin, *rows[1:]])
    numbers = {f"batch_req_{i}" for i, line in lines if line.strip(b" \t\r\v\f")}
    assert Counter(key[0] for key in expected) == Counter(numbers)
    for _ in range(3):
        whole = output.read_bytes()
        output.write_bytes(whole[: rng.randint(0, len(whole))])
        run_job(source, output)
        assert summaries(output) == expected
