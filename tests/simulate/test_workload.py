"""Traces: exact shares, lengths that follow their law, the same rows everywhere."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.messages.requests import unpack_tokens
from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.workload import TraceRow, Workload

TRACES = Path(__file__).parents[2] / "jobs" / "traces"
SPEC = """
description = "Chat with a few books"
seed = 7

[classes.chat]
prompt = { law = "lognormal", median = 250, sigma = 0.5, min = 1, max = 8_000 }
output = { law = "uniform", min = 1, max = 400 }

[classes.book]
long = true
prompt = { law = "loguniform", min = 20_000, max = 160_000 }
output = 300

[classes.bot]
prompt = 10
output = 20
prefixes = { count = 4, tokens = { law = "uniform", min = 100, max = 200 }, zipf = 1.0 }

[classes.helper]
prompt = 11
output = 20
prefixes = { count = 2, tokens = 50 }

[traces]
chat = { chat = 1 }
books = { book = 1 }
mixed = { chat = 95, book = 5 }
thirds = { chat = 1, book = 1, bot = 1 }
bots = { bot = 25, helper = 10 }
"""

PINNED = [
    TraceRow(33636, 300, long=True),  # 20 000 · 8^¼
    TraceRow(178, 300),
    TraceRow(350, 101),
    TraceRow(198, 20, prefix=1, prefix_tokens=188),
    TraceRow(148, 20, prefix=0, prefix_tokens=138),
    TraceRow(95137, 300, long=True),  # 20 000 · 8^¾
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "spec.toml"
    path.write_text(SPEC)
    return path


def load(path, name, rows=1000):
    return Workload.load(f"{path}#{name}").head(rows)


def test_each_class_has_its_exact_share(path):
    assert sum(row.long for row in load(path, "mixed").rows) == 50
    assert sum(row.long for row in load(path, "mixed", 20).rows) == 1


@given(rows=st.integers(1, 50))
def test_shares_are_at_most_one_row_off_and_none_is_lost(path, rows):
    drawn = load(path, "thirds", rows).rows
    counts = [sum(row.long for row in drawn), sum(row.prefix >= 0 for row in drawn)]
    counts.append(rows - sum(counts))
    assert len(drawn) == rows
    assert all(abs(count - rows / 3) < 1 for count in counts)


def test_long_rows_come_anywhere_in_the_trace(path):
    at = [i for i, row in enumerate(load(path, "mixed").rows) if row.long]
    assert min(at) < 150
    assert max(at) > 850
    assert 300 < np.mean(at) < 700


def test_lengths_follow_their_law(path):
    chat, books = load(path, "chat").rows, load(path, "books").rows
    logs = np.log([row.prompt for row in chat])
    assert np.median(logs) == pytest.approx(math.log(250), abs=0.01)
    assert np.std(logs) == pytest.approx(0.5, rel=0.02)
    outputs = np.array([row.output for row in chat])
    assert np.mean(outputs) == pytest.approx(200.5, rel=0.01)
    assert np.std(outputs) == pytest.approx(399 / math.sqrt(12), rel=0.02)
    octaves = Counter(int(math.log2(row.prompt / 20_000)) for row in books)
    assert [octaves[k] for k in range(3)] == pytest.approx([333, 333, 333], abs=2)
    assert {row.output for row in books} == {300}


def test_lengths_are_clipped(tmp_path):
    path = tmp_path / "clipped.toml"
    path.write_text(SPEC.replace("min = 1, max = 8_000", "min = 200, max = 300"))
    prompts = [row.prompt for row in load(path, "chat").rows]
    assert min(prompts) == 200
    assert max(prompts) == 300


def test_prompt_and_output_are_drawn_independently(path):
    rows = load(path, "chat").rows
    assert abs(np.corrcoef([r.prompt for r in rows], [r.output for r in rows])[0, 1]) < 0.1


def test_rows_are_the_same_everywhere(path):
    assert load(path, "thirds", 6).rows == PINNED


def test_another_seed_shuffles_the_same_lengths(path, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(SPEC.replace("seed = 7", "seed = 8"))
    one, two = load(path, "mixed").rows, load(other, "mixed").rows
    assert one != two
    assert sorted(r.prompt for r in one) == sorted(r.prompt for r in two)
    assert sorted(r.output for r in one) == sorted(r.output for r in two)


def test_a_head_looks_like_the_whole(path):
    whole, head = load(path, "mixed").summary(), load(path, "mixed", 100).summary()
    assert head["rows"] == 100
    assert head["p50"] == pytest.approx(whole["p50"], rel=0.1)
    assert head["long_share"] == pytest.approx(whole["long_share"], rel=0.05)


def test_scaling_divides_every_length(path):
    trace = load(path, "bots", 35)
    scaled = trace.scaled(30)
    assert "30" in scaled.name
    assert "30" in scaled.description
    for row, small in zip(trace.rows, scaled.rows, strict=True):
        assert abs(small.prefix_tokens - row.prefix_tokens / 30) <= 0.5
        assert small.prompt - small.prefix_tokens == 1
        assert small.output == 1
        assert small.prefix == row.prefix


def test_scaling_never_makes_an_empty_row(path):
    for row in load(path, "thirds", 60).scaled(1e9).rows:
        assert row.output == 1
        assert row.prompt - row.prefix_tokens == 1
        assert row.prefix_tokens == (row.prefix >= 0)


def test_scaling_and_head_commute(path):
    trace = load(path, "thirds")
    assert trace.scaled(8).head(30).rows == trace.head(30).scaled(8).rows
    assert trace.scaled(8).rows == trace.scaled(2).scaled(4).rows


def test_prefixes_are_used_by_zipfs_law(path):
    uses = Counter(row.prefix for row in load(path, "bots", 35).rows)
    # 1 : 1/2 : 1/3 : 1/4 is 12 : 6 : 4 : 3, and the other class numbers its own two further on.
    assert uses == {0: 12, 1: 6, 2: 4, 3: 3, 4: 5, 5: 5}


def test_rows_of_a_prefix_share_its_length(path):
    whole, head = load(path, "bots", 350).rows, load(path, "bots", 35).rows
    tokens = dict[int, int]()
    for row in whole + head:
        assert tokens.setdefault(row.prefix, row.prefix_tokens) == row.prefix_tokens
        assert row.prompt == row.prefix_tokens + (10 if row.prefix < 4 else 11)
    assert sorted(tokens[k] for k in range(4)) == [112, 138, 162, 188]
    assert {tokens[4], tokens[5]} == {50}


def test_the_summary_adds_up(tmp_path):
    path = tmp_path / "four.toml"
    path.write_text(
        SPEC.replace('prompt = { law = "loguniform", min = 20_000, max = 160_000 }', "prompt = 900")
        .replace("output = 300", "output = 100")
        .split("[traces]")[0]
        + '[classes.one]\nprompt = 60\noutput = 40\n[traces]\n"x" = { one = 3, book = 1 }'
    )
    summary = Workload.load(path).head(4).summary()
    assert summary["rows"] == 4
    assert summary["prompt_tokens"] == 3 * 60 + 900
    assert summary["output_tokens"] == 3 * 40 + 100
    assert (summary["p50"], summary["p99"], summary["max"]) == (100, 1000, 1000)
    assert summary["long_share"] == pytest.approx(1000 / 1300)


def test_requests_have_the_lengths_of_their_rows(path):
    trace = load(path, "thirds", 30).scaled(100)
    requests = trace.requests(vocab_size=50)
    assert [request.id for request in requests] == list(range(30))
    for row, request in zip(trace.rows, requests, strict=True):
        tokens = unpack_tokens(request.prompt)
        assert len(tokens) == row.prompt
        assert 0 <= min(tokens) <= max(tokens) < 50
        assert request.sampling.max_tokens == row.output
        assert request.sampling.stop_token_ids == ()
    assert trace.requests(vocab_size=50) == requests


def test_requests_share_their_prefix_and_nothing_more(path):
    trace = load(path, "bots", 70)
    prompts = [unpack_tokens(request.prompt) for request in trace.requests(1000)]
    texts = dict[int, list[int]]()
    for row, prompt in zip(trace.rows, prompts, strict=True):
        text = prompt[: row.prefix_tokens]
        assert texts.setdefault(row.prefix, text) == text
    assert len({tuple(text[:50]) for text in texts.values()}) == 6
    own = {tuple(p[r.prefix_tokens :]) for r, p in zip(trace.rows, prompts, strict=True)}
    assert len(own) == 70


def test_random_tokens_cover_the_vocabulary_evenly(path):
    counts = np.zeros(10)
    for request in load(path, "chat", 200).requests(10):
        counts += np.bincount(unpack_tokens(request.prompt), minlength=10)
    assert counts / counts.sum() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("median = 250", "median = 0", r"classes\.chat.*prompt\.median"),
        ("sigma = 0.5", "sigma = nan", r"classes\.chat.*prompt\.sigma"),
        ("min = 20_000", "min = 200_000", r"classes\.book.*min is 200000.*above max.*prompt"),
        ('"loguniform"', '"normal"', r"classes\.book.*normal.*prompt\.law"),
        ("output = 300", "output = 0", r"classes\.book.*output"),
        ("output = 300", "", r"classes\.book.*output"),
        ("long = true", "lang = true", r"classes\.book.*lang"),
        ("count = 4", "count = 0", r"classes\.bot.*prefixes\.count"),
        ("zipf = 1.0", "zipf = -1", r"classes\.bot.*prefixes\.zipf"),
        ("book = 5", "novel = 5", r"traces\.mixed.*novel.*no such class.*chat, book"),
        ("{ chat = 95, book = 5 }", "{}", r"traces\.mixed"),
        ("book = 5", "book = 0.5", r"traces\.mixed.*float"),
        ("seed = 7", "seed = -7", r"seed"),
        ("seed = 7", "", r"seed"),
        ("seed = 7", "seed = 7\nrows = 0", r"rows"),
        ("seed = 7", "seed = 7\nclases = 1", r"clases"),
        ("[traces]", "[traces", r"not TOML.*line"),
    ],
)
def test_a_bad_file_is_refused_by_the_key(tmp_path, old, new, named):
    path = tmp_path / "bad.toml"
    assert old in SPEC
    path.write_text(SPEC.replace(old, new))
    with pytest.raises(OptionError, match=rf"bad\.toml.*{named}"):
        Workload.load(f"{path}#mixed")


def test_a_trace_is_named_where_a_file_has_several(path, tmp_path):
    assert [t.name for t in Workload.load_all(path)] == ["chat", "books", "mixed", "thirds", "bots"]
    with pytest.raises(OptionError, match=r"several traces.*#NAME.*chat, books"):
        Workload.load(path)
    with pytest.raises(OptionError, match=r"no trace nix.*chat, books"):
        Workload.load(f"{path}#nix")
    with pytest.raises(OptionError, match=r"absent\.toml cannot be read: No such file"):
        Workload.load(tmp_path / "absent.toml")


@pytest.mark.parametrize("factor", [0, -2, math.nan, math.inf])
def test_senseless_sizes_are_refused(path, factor):
    trace = load(path, "chat")
    with pytest.raises(OptionError, match="divided"):
        trace.scaled(factor)
    with pytest.raises(OptionError, match="at least 1 row"):
        trace.head(0)
    with pytest.raises(OptionError, match="vocab_size"):
        trace.requests(0)


@pytest.mark.parametrize("file", sorted(TRACES.glob("*.toml")), ids=lambda file: file.stem)
def test_committed_files_say_that_they_are_synthetic(file):
    comments = " ".join(
        line for line in file.read_text().splitlines() if line.startswith("#")
    ).casefold()
    assert "synthetic" in comments
    for trace in Workload.load_all(file):
        assert len(trace.rows) == 1000
        assert all(row.prompt > row.prefix_tokens >= 0 < row.output for row in trace.rows)


def test_the_short_traces_stay_below_60k_and_grow_longer():
    short = [trace.summary() for trace in Workload.load_all(TRACES / "short.toml")]
    assert [50_000 < summary["max"] <= 60_000 for summary in short] == [True] * 3
    shares = [summary["long_share"] for summary in short]
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("thousands", [200, 280, 480, 600, 1200, 2000])
def test_the_long_traces_reach_their_maximum_and_never_pass_it(thousands):
    longest = Workload.load(TRACES / f"long.toml#long-{thousands}k").summary()["max"]
    assert 0.95 * thousands * 1000 < longest <= thousands * 1000


def test_the_mixes_are_a_grid_of_shares_and_lengths():
    grid = set()
    for trace in Workload.load_all(TRACES / "mixes.toml"):
        long = [row.prompt for row in trace.rows if row.long]
        grid.add((len(long) / 10, round(max(long), -4)))
        assert trace.name == f"share-{len(long) // 10:02}-long-{round(max(long), -4) // 1000}k"
    assert grid == {(s, k) for s in (1, 2, 5, 10, 20, 30) for k in (20_000, 60_000, 150_000)}


def test_the_uniform_trace_has_one_length():
    assert set(Workload.load(TRACES / "uniform.toml").rows) == {TraceRow(256, 128)}


def test_most_rows_of_the_prefix_trace_share_their_prefix():
    rows = Workload.load(TRACES / "prefix.toml").rows
    uses = Counter(row.prefix for row in rows if row.prefix >= 0)
    assert sum(uses.values()) == 900
    assert min(uses.values()) > 1


def test_rows_with_limits_above_their_outputs_end_at_a_random_token():
    trace = Workload.load(TRACES / "uniform.toml").head(200)
    assert trace.limited(1) is trace
    limited = trace.limited(2.5)
    assert {row.limit for row in limited.rows} == {320}
    assert [row._replace(limit=0) for row in limited.rows] == trace.rows
    vocabulary = 5000
    requests = limited.requests(vocabulary)
    assert {request.sampling.max_tokens for request in requests} == {320}
    assert len({request.sampling.stop_token_ids for request in requests}) == 200
    ends = [len(request.sampling.stop_token_ids) / vocabulary for request in requests]
    assert 0.9 / 128 < min(ends) <= max(ends) <= 1 / 128
    with pytest.raises(OptionError, match="at least the outputs"):
        trace.limited(0.5)
