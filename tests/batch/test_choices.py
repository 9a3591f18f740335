"""A row with several answers is written once, when all are there, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import (
    ByteTokenizer,
    answer,
    chat,
    completion,
    make_service,
    open_journal,
    read_lines,
    run_job,
    summaries,
    write_lines,
)
from hypothesis import given
from hypothesis import strategies as st
from test_rows import parse

from hpc_distkv.batch.answers.choice import read_choice
from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.job import Job
from hpc_distkv.control.messages.requests import NOT_FINITE, Result, pack_tokens
from hpc_distkv.model.detokenizer import DecodingDetokenizer, Detokenizer


def open_job(folder: Path) -> Job:
    return Job(Intake(folder / "in"), open_journal(folder / "out", {}), make_service())


def test_the_row_is_written_with_its_last_answer_in_any_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", [1, 2], n=3), completion("b", [3])])
    for order in itertools.permutations(range(3)):
        job = open_job(tmp_path)
        requests = list(job.requests())
        assert len(requests) == 4
        results = [Result(r.id, pack_tokens([65 + r.id]), "stop", 0.1, 0.2) for r in requests[:3]]
        written = []
        for place, index in enumerate(order):
            job.commit()
            assert len(read_lines(tmp_path / "out")) == 0, f"after {place} answers"
            written.append(job.finish(results[index]))
        assert written == [None, None, (results, "a", 2)]
        assert (job.answered, job.in_flight) == (1, 1)
        job.close()
        [line] = read_lines(tmp_path / "out")
        body = line["response"]["body"]
        assert [choice["text"] for choice in body["choices"]] == ["A", "B", "C"]
        assert body["usage"]["completion_tokens"] == 3
        for file in ("out", "out.meta.json"):
            (tmp_path / file).unlink()


def test_a_run_that_ends_between_answers_leaves_the_others_for_the_next(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", n=3)])
    job = open_job(tmp_path)
    requests = list(job.requests())
    for request in requests[:2]:
        job.finish(answer(request))
    job.close()
    assert read_lines(tmp_path / "out") == []
    again = open_job(tmp_path)
    assert list(again.requests()) == requests[2:]
    again.finish(answer(requests[2]))
    again.close()
    (tmp_path / "whole").mkdir()
    write_lines(tmp_path / "whole" / "in", [completion("a", n=3)])
    run_job(tmp_path / "whole" / "in", tmp_path / "whole" / "out")
    assert summaries(tmp_path / "out") == summaries(tmp_path / "whole" / "out")


def test_a_row_that_is_to_have_no_more_answers_than_were_made_is_written(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", n=3)])
    job = open_job(tmp_path)
    for request in list(job.requests())[:2]:
        job.finish(answer(request))
    job.close()
    write_lines(tmp_path / "in", [completion("a", n=2)])
    again = open_job(tmp_path)
    assert list(again.requests()) == []
    assert (again.answered, again.in_flight) == (1, 0)
    again.close()
    [line] = read_lines(tmp_path / "out")
    assert len(line["response"]["body"]["choices"]) == 2


def test_an_answer_that_is_no_number_makes_an_error_row_and_counts_for_nothing(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in", [completion("a", n=3)])
    job = open_job(tmp_path)
    first, *others = job.requests()
    assert job.finish(answer(first)) is None
    for request in others:
        assert job.finish(Result(request.id, b"", NOT_FINITE, 0.1, 0.2)) is None
    job.close()
    assert (job.answered, job.failed) == (0, 1)


def test_an_error_of_one_answer_is_that_of_the_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [completion("a", n=3)])
    job = open_job(tmp_path)
    first, second, third = job.requests()
    job.finish(answer(first))
    job.refuse(second.id, RowError("no"))
    job.finish(answer(third))
    job.refuse(third.id, RowError("no"))
    job.close()
    [line] = read_lines(tmp_path / "out")
    assert line["error"]["message"] == "no"
    assert (job.answered, job.failed, job.complete) == (0, 1, True)


def test_every_option_reaches_the_line(tmp_path: Path) -> None:
    rows = [
        completion("echo", "ab", echo=True, n=2),
        completion("scores", "ab", logprobs=2),
        chat("chat", "ab", logprobs=True, top_logprobs=1, n=2),
        chat("bare", "ab", logprobs=True),
    ]
    write_lines(tmp_path / "in", rows)
    run_job(tmp_path / "in", tmp_path / "out")
    lines = {line["custom_id"]: line["response"]["body"] for line in read_lines(tmp_path / "out")}
    assert [choice["text"] for choice in lines["echo"]["choices"]] == ["abba", "abba"]
    [scores] = [choice["logprobs"] for choice in lines["scores"]["choices"]]
    assert scores["tokens"] == ["b", "a", "<256>"]
    assert scores["text_offset"] == [0, 1, 2]
    assert scores["token_logprobs"] == pytest.approx([-0.6931] * 3, abs=1e-4)
    for choice in lines["chat"]["choices"]:
        assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [1] * 5
    [bare] = lines["bare"]["choices"]
    assert bare["logprobs"]["content"][0]["top_logprobs"] == []


def text(
    tokens: list[int], text_end: int | None = None, reason: str = "stop", **fields: Any
) -> str:
    row = parse(completion("a", max_tokens=20, **fields))
    result = Result(0, pack_tokens(tokens), reason, 0.1, 0.2, text_end=text_end)
    return read_choice(result, row, make_service().tokenizer).text


def test_the_text_of_a_result() -> None:
    assert text(list(b"hello")) == "hello"
    assert text([*b"hello", 257]) == "hello"
    assert text([*b"hello", 257], skip_special_tokens=False) == "hello<257>"
    assert text(list(b"hello"), text_end=2, stop="llo") == "he"
    assert text(list("h\u00e9l".encode()), text_end=2, stop="l") == "h\u00e9"
    assert text([]) == ""


@pytest.mark.parametrize("asked", [{}, {"stop": "x"}, {"skip_special_tokens": False}])
def test_half_a_character_at_the_end_is_dropped_whatever_is_asked(asked: dict[str, Any]) -> None:
    assert text(list("h\u00e9".encode())[:-1], **asked) == "h"
    assert text([*b"h\xc3i", 0xFF, 0xC3], **asked) == "h\ufffdi\ufffd"


class Words(ByteTokenizer):
    """Its text is known to a decoder only: a space before every token but the first."""

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        def decode(ids: Sequence[int]) -> str:
            shown = [i for i in ids if i < 256 or not skip_special_tokens]
            return b" ".join(map(self.token_bytes, shown)).decode(errors="replace")

        return DecodingDetokenizer(decode, prompt)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), Words()])
@given(st.lists(st.sampled_from([*b"ab \xc3\xa9\xf0\x9f\xff", 257]), max_size=20), st.booleans())
def test_the_text_is_the_same_whatever_is_asked_beside_it(
    tokenizer: ByteTokenizer, tokens: list[int], skip: bool
) -> None:
    texts = set()
    for fields in ({}, {"stop": "zz"}, {"logprobs": 0}, {"logprobs": 0, "stop": ["zz", "y"]}):
        row = parse(completion("a", [1], max_tokens=20, skip_special_tokens=skip, **fields))
        scores = bytes(4 * len(tokens)) if "logprobs" in fields else b""
        result = Result(0, pack_tokens(tokens), "length", 0.1, 0.2, logprobs=scores)
        choice = read_choice(result, row, tokenizer)
        texts.add(choice.text)
        if choice.logprobs:
            offsets = choice.logprobs["text_offset"]
            assert len(offsets) == len(tokens) == choice.tokens
            assert sorted(offsets) == offsets
            assert all(0 <= offset <= len(choice.text) for offset in offsets)
    assert len(texts) == 1


def test_the_token_that_ends_an_answer_counts_and_is_no_text() -> None:
    for fields, shown in (({}, "hi"), ({"include_stop_str_in_output": True}, "hix")):
        row = parse(completion("a", stop_token_ids=[120], logprobs=0, **fields))
        tokens = [*b"hi", 120]
        result = Result(0, pack_tokens(tokens), "stop", 0.1, 0.2, logprobs=bytes(3 * 4))
        choice = read_choice(result, row, make_service().tokenizer)
        assert (choice.text, choice.tokens) == (shown, 3)
        assert choice.logprobs is not None
        assert choice.logprobs["tokens"] == ["h", "i", "x"]
        assert choice.logprobs["text_offset"] == [0, 1, 2]
    # By length, or by a stop string that ends with the same token: the text is what it is.
    assert text([*b"hi", 120], stop_token_ids=[120], reason="length") == "hix"
    assert text([*b"hi", 120], text_end=3, stop="ix", stop_token_ids=[120]) == "hix"
