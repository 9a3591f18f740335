"""Random rows through a whole job on a real engine: each has its line, and the job ends."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_ranks import open_local, run_local

from hpc_distkv import Engine, EngineOptions, Files
from hpc_distkv.comm.transport import Comm

ROWS_AT_ONCE, EXAMPLES = 100, 20

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 20, 21, 128, 10**9, 10**30, 0.5, -0.5, 1.5, 1e-9, 1e9, math.nan, math.inf]
)
JUNK = st.sampled_from(["", "x", None, True, False, [], {}, [1], ["a"], {"5": 1}, [""], "\ud800"])
ANY = NUMBERS | JUNK
"""What may stand in any field."""
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 4),
    "max_tokens": st.integers(1, 12),
    "max_completion_tokens": st.integers(1, 12),
    "min_tokens": st.integers(0, 8),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 400),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 3),
    "logit_bias": st.dictionaries(st.integers(0, 319).map(str), st.floats(-100, 100), max_size=4),
    "stop": st.text("abe \u00e9", min_size=1, max_size=2)
    | st.lists(st.text("abe \u00e9", min_size=1, max_size=2), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 319), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 20),
    "top_logprobs": st.integers(0, 20),
    "tools": st.just([{"type": "function"}]),
    "stream": st.booleans(),
    "response_format": st.just({"type": "json_object"}),
    "lora_request": st.just({"lora_name": "x"}),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An endpoint and a body, mostly of good values."""
    names = draw(st.lists(st.sampled_from([*FIELDS]), max_size=6, unique=True))
    body = {name: draw(FIELDS[name] if draw(st.integers(0, 7)) else ANY) for name in names}
    body.setdefault("max_tokens", draw(st.integers(1, 12)))
    text = draw(st.text(max_size=12))
    if draw(st.booleans()):
        messages = [{"role": "user", "content": text}]
        return "chat/completions", {"messages": messages} | body
    prompt = draw(st.just(text) | st.lists(st.integers(-1, 330), max_size=6))
    return "completions", {"prompt": prompt} | body


@st.composite
def batches(draw: st.DrawFn) -> list[bytes]:
    """The lines of one job; a few are cut or garbled."""
    rng = draw(st.randoms(use_true_random=False))
    lines = []
    for number in range(ROWS_AT_ONCE):
        url, body = draw(bodies())
        row = {"custom_id": str(number), "method": "POST", "url": f"/v1/{url}", "body": body}
        line = bytearray(json.dumps(row).encode())
        if rng.random() < 0.05:
            line[rng.randrange(len(line))] = rng.choice(b'\xff{}[]"0x ')
        if rng.random() < 0.02:
            del line[rng.randrange(1, len(line)) :]
        lines.append(bytes(line))
    return lines


def run_jobs(model: Path, files: Files, ranks: int, blocks: int) -> None:
    options = EngineOptions(
        dtype="float32", num_blocks=blocks, block_size=8, threads=1, max_num_seqs=16
    )

    def work(comm: Comm) -> None:
        engine = Engine(model, options, max_model_len=64, comm=comm)
        engine.run(files)

    run_local(open_local(ranks, 60.0), work)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)
@given(lines=batches())
def test_two_thousand_random_rows_have_a_line_each_on_any_ranks(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("job")
    source = folder / "rows.jsonl"
    lines = [b"{}", *lines]  # a file without any JSON is refused
    source.write_bytes(b"\n".join(lines) + b"\n")
    found = []
    for ranks, blocks in ((1, 200), (2, 12)):
        files = Files(source, folder / f"results-{ranks}.jsonl")
        run_jobs(tiny_model, files, ranks, blocks)
        rows = [json.loads(line) for line in files.output.read_bytes().splitlines()]
        assert sorted(row["id"] for row in rows) == sorted(
            f"batch_req_{number}" for number, line in enumerate(lines) if line.strip()
        )
        found.append({row["id"]: check(row) for row in rows})
    assert found[0] == found[1]


def check(row: dict[str, Any]) -> Any:
    """What must not depend on where a row runs; messages say how much room there is."""
    body = row["response"]["body"]
    if row["error"]:
        assert 400 <= row["response"]["status_code"] < 500
        return body["error"]["code"], body["error"]["param"]
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    for choice in choices:
        assert choice["finish_reason"] in ("stop", "length")
    return [
        (choice.get("text") or choice.get("message"), choice["finish_reason"]) for choice in choices
    ], body["usage"]


def test_a_prompt_of_ten_megabytes_is_an_error_row(tmp_path: Path, tiny_model: Path) -> None:
    words = "".join(random.Random(0).choices("abcdefg \n", k=10_000_000))
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": text}}
        for name, text in (("words", words), ("one", "a" * 10_000_000), ("good", "hi"))
    ]
    rows[2]["body"]["max_tokens"] = 3
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    files = Files(source, tmp_path / "out.jsonl")
    run_jobs(tiny_model, files, 1, 200)
    lines = {row["custom_id"]: row for row in map(json.loads, files.output.open())}
    for name in ("words", "one"):
        assert lines[name]["error"]["code"] == "context_length_exceeded"
    assert lines["good"]["error"] is None
