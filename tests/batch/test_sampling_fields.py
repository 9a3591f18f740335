"""The sampling fields of a row: what they become, and what is wrong with bad ones."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from batch_fakes import EOS, chat, completion, make_service
from test_rows import parse, refused, with_body

from hpc_distkv.batch.input.rows import derive_seed, which_choice
from hpc_distkv.control.messages.requests import LogitRules, Sampling


def sampling(service: Any = None, **fields: Any) -> Sampling:
    """Of a completion and of a chat, which must agree; a seed is given to have them agree."""
    fields = {"seed": 1, "max_tokens": 9} | fields
    found = [parse(make("a", **fields), service).sampling for make in (completion, chat)]
    assert found[0] == found[1]
    return found[0]


def test_a_plain_row_has_no_rules_and_few_bytes() -> None:
    plain = sampling(temperature=0)
    assert plain.rules is None
    assert plain.logprobs is None
    assert len(msgspec.msgpack.encode(plain)) < 50


@pytest.mark.parametrize(
    ("field", "neutral"),
    [
        ("n", 1),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0),
        ("repetition_penalty", 1.0),
        ("logprobs", False),
        ("stop", []),
        ("stop", ""),
        ("min_p", 0),
        ("min_tokens", 0),
        ("logit_bias", {}),
        ("logit_bias", {"5": 0}),
        ("include_stop_str_in_output", False),
        ("skip_special_tokens", True),
        ("echo", False),
    ],
)
def test_neutral_values_and_null_change_nothing(field: str, neutral: Any) -> None:
    for make in (completion, chat):
        assert parse(make("a", **{field: neutral})) == parse(make("a"))
        assert parse(make("a", **{field: None})) == parse(make("a"))


def test_rules_hold_what_changes_logits() -> None:
    found = sampling(
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"7": -100, "3": 2.5},
        min_tokens=2,
        stop_token_ids=[4],
    )
    assert found.rules == LogitRules(1.5, -1.0, 0.5, ((3, 2.5), (7, -100.0)), (EOS, 4))
    assert found.min_tokens == 2


def test_min_tokens_withholds_the_end_also_where_it_is_ignored() -> None:
    found = sampling(min_tokens=2, ignore_eos=True)
    assert found.stop_token_ids == ()
    assert found.rules is not None
    assert found.rules.withheld == (EOS,)


def test_stop_strings() -> None:
    assert sampling(stop="\n").stop == ("\n",)
    assert sampling(stop=["a", "b", "a"], include_stop_str_in_output=True).stop == ("a", "b")
    assert sampling(stop="a", include_stop_str_in_output=True).include_stop
    assert not sampling(skip_special_tokens=False).skip_special_tokens


def test_defaults_of_the_model_and_their_overriding() -> None:
    service = make_service(min_p=0.1, repetition_penalty=1.2)
    assert sampling(service).rules == LogitRules(repetition_penalty=1.2, min_p=0.1)
    assert sampling(service, min_p=0, repetition_penalty=1) == sampling()


def test_logprobs_are_spelled_differently_in_chats_and_completions() -> None:
    for fields, top in (
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ):
        assert parse(chat("a", **fields)).sampling.logprobs == top
    assert parse(completion("a", logprobs=0)).sampling.logprobs == 0
    assert parse(completion("a", logprobs=5)).sampling.logprobs == 5
    assert refused(chat("a", top_logprobs=1)).param == "top_logprobs"
    assert refused(chat("a", logprobs=False, top_logprobs=1)).param == "top_logprobs"
    assert refused(chat("a", logprobs=3)).param == "logprobs"
    assert refused(completion("a", logprobs=True)).param == "logprobs"
    assert refused(completion("a", top_logprobs=1)).code == "unknown_parameter"


def test_echo_keeps_the_prompt_as_it_was_given() -> None:
    assert parse(completion("a", "h\u00e9", echo=True)).echo == "h\u00e9"
    assert parse(completion("a", [104, 105, 257], echo=True)).echo == "hi"
    assert parse(completion("a", [104, 257], echo=True, skip_special_tokens=False)).echo == "h<257>"
    assert refused(chat("a", echo=True)).code == "unsupported_parameter"
    error = refused(completion("a", echo=True, logprobs=1))
    assert (error.param, error.code) == ("logprobs", "unsupported_parameter")


def test_choices_are_requests_with_seeds_of_their_own() -> None:
    row = parse(chat("a", n=128), number=5)
    requests = list(row.requests())
    assert [which_choice(request.id) for request in requests] == [(5, i) for i in range(128)]
    assert len({request.sampling.seed for request in requests}) == 128
    assert all(0 <= request.sampling.seed < 2**63 for request in requests)
    assert requests[0] == next(parse(chat("a"), number=5).requests())
    [before] = parse(chat("b"), number=4).requests()
    [after] = parse(chat("b"), number=6).requests()
    assert before.id < requests[0].id <= requests[-1].id < after.id
    seeds = [derive_seed(11, f"choice {i}") for i in (1, 2)]
    given = parse(chat("a", n=3, seed=11)).requests()
    assert [request.sampling.seed for request in given] == [11, *seeds]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("n", True),
        ("min_tokens", -1),
        ("min_tokens", 10),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 1e300),
        ("logit_bias", []),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"\u0663": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"300": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": None}),
        ("stop", 3),
        ("stop", [1, 2]),
        ("stop", ["a", ""]),
        ("stop", {}),
        ("include_stop_str_in_output", 1),
        ("skip_special_tokens", "yes"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", "3"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    for row in (
        completion("a", max_tokens=9, **{field: value}),
        chat("a", max_tokens=9, **{field: value}),
    ):
        error = refused(row)
        assert error.status == 400
        assert (error.param or "").startswith(field)
        assert field in error.message
        assert len(error.message) < 1000


@pytest.mark.parametrize("field", ["min_p", "presence_penalty", "repetition_penalty"])
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(field: str, literal: str) -> None:
    line = with_body(**{field: 0.5}).replace(b"0.5", literal.encode())
    assert refused(line).status == 400
    bias = with_body(logit_bias={"5": 0.5}).replace(b"0.5", literal.encode())
    assert refused(bias).status == 400


def test_a_long_stop_list_and_all_tokens_biased_are_fine() -> None:
    stops = [f"stop {i}" for i in range(1000)]
    assert len(sampling(stop=stops).stop) == 1000
    bias = {str(i): -50 for i in range(300)}
    found = json.dumps(completion("a", logit_bias=bias)).encode()
    rules = parse(found).sampling.rules
    assert rules is not None
    assert len(rules.logit_bias) == 300
