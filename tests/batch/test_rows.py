"""Each thing a row may say is either obeyed or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from batch_fakes import EOS, chat, completion, make_service

from hpc_distkv.batch.answers.choice import Choice
from hpc_distkv.batch.answers.line import answer_line
from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.envelope import CHAT, read_envelope
from hpc_distkv.batch.input.rows import Row, derive_seed, parse_row, which_choice
from hpc_distkv.batch.input.service import Service
from hpc_distkv.control.messages.requests import unpack_tokens
from hpc_distkv.model.errors import ModelError


def parse(row: Any, service: Service | None = None, number: int = 0) -> Row:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(read_envelope(line, number), service or make_service())


def refused(row: Any, service: Service | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        parse(row, service)
    return caught.value


def with_body(**fields: Any) -> bytes:
    return json.dumps(completion("a", **fields)).encode()


def test_completion_of_text_gets_special_tokens() -> None:
    row = parse(completion("a", "hé", max_tokens=5), number=7)
    assert row.prompt == [256, *"hé".encode()]
    assert (row.number, row.custom_id, row.endpoint) == (7, "a", "/v1/completions")
    [request] = row.requests()
    assert which_choice(request.id) == (7, 0)
    assert unpack_tokens(request.prompt) == row.prompt
    assert request.sampling == row.sampling


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids_are_taken_as_they_are(prompt: Any) -> None:
    assert parse(completion("a", prompt)).prompt == [1, 2, 3]


def test_list_of_one_text() -> None:
    assert parse(completion("a", ["x"])).prompt == [256, 120]


def test_chat_of_text_and_of_parts() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert parse(chat("a", "h\ni")).prompt == parse(chat("a", parts)).prompt
    assert parse(chat("a", "x")).prompt == [256, 257, 120, 258]


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [1, "a"], ["a", "b"], [[1], [2]], [True], [1.0], [None], [[["x"]]], {}, 3, None, ""],
)
def test_prompts_of_no_or_several_texts_are_refused(prompt: Any) -> None:
    service = make_service()
    object.__setattr__(
        service, "tokenizer", type("T", (), {"encode": lambda self, text, most: []})()
    )
    assert refused(completion("a", prompt), service).param == "prompt"


@pytest.mark.parametrize("token", [-1, 300, 10**30, 2**31])
def test_token_ids_outside_of_the_vocabulary_are_refused(token: int) -> None:
    error = refused(json.dumps(completion("a", [1, token])).encode())
    assert error.status == 400
    assert refused(completion("a", stop_token_ids=[token])).param.startswith("stop_token_ids")


@pytest.mark.parametrize(
    "content",
    [None, 3, [], [{"type": "image_url", "image_url": {}}], [{"type": "text"}], [{"text": "x"}]],
)
def test_content_other_than_text(content: Any) -> None:
    if content == []:
        assert parse(chat("a", content)).prompt == [256, 257, 258]
    else:
        assert "content" in (refused(chat("a", content)).param or "")


def test_template_that_refuses_becomes_a_row_error() -> None:
    row = chat("a")
    row["body"]["messages"][0]["role"] = "alien"
    error = refused(row)
    assert error.code == "tokenization_failed"
    assert "no such role" in error.message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            chat("a", [{"type": "image_url", "image_url": {}}]),
            "'image_url' is not supported, only text",
        ),
        (chat("a", [{"image_url": {}, "type": "image_url"}]), "only text is."),
        (completion("a", tools=[{}]), "'tools' is not supported here, other than [] or null."),
        (completion("a", best_of=2), "'best_of' is not supported here, other than 1 or null."),
        (completion("a", suffix="x"), 'other than "" or null.'),
    ],
)
def test_what_is_not_supported_is_said_with_what_is(row: dict[str, Any], said: str) -> None:
    error = refused(row)
    assert error.code == "unsupported_parameter"
    assert said in error.message


def test_answers_of_tools_are_not_supported() -> None:
    row = chat("a")
    row["body"]["messages"][0]["tool_call_id"] = "call 1"
    assert refused(row).message == (
        "'messages[0].tool_call_id' is not supported here, other than null."
    )
    row["body"]["messages"] = [{"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert refused(row).message == (
        "'messages[0].tool_calls' is not supported here, other than [] or null."
    )


def test_what_the_model_says_of_a_prompt_is_said_without_our_names() -> None:
    service = make_service()

    def refuse(*_: Any, **__: Any) -> list[int]:
        raise ModelError("no such role")

    object.__setattr__(service, "chat", refuse)
    message = refused(chat("a"), service).message
    assert message == "'messages' could not be turned into tokens: no such role"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "refusal"}]}, "messages[0].content[0].refusal"),
        ({"role": "user", "content": "x", "images": ["x"]}, "messages[0].images"),
        ({"role": "assistant", "content": "x", "prefix": True}, "messages[0].prefix"),
        ({"role": "assistant", "function_call": {}}, "messages[0].function_call"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "assistant", "content": "x", "reasoning": [1]}, "messages[0].reasoning"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ("hello", "messages[0]"),
    ],
)
def test_malformed_messages_are_refused_by_name(message: Any, param: str) -> None:
    row = chat("a")
    row["body"]["messages"] = [message]
    assert refused(row).param == param


def as_template(*messages: Any) -> list[dict[str, Any]]:
    """What the chat template gets."""
    service, seen = make_service(), []

    def take(messages: list[dict[str, Any]], most: int | None = None) -> list[int]:
        seen.extend(messages)
        return [1]

    object.__setattr__(service, "chat", take)
    row = chat("a")
    row["body"]["messages"] = list(messages)
    parse(row, service)
    return seen


def test_the_message_of_a_former_answer_is_taken_as_clients_send_it_back() -> None:
    plain = {"role": "assistant", "content": "x"}
    ours = answer_line(
        number=0,
        custom_id="a",
        endpoint=CHAT,
        model="m",
        choices=[Choice("x", "stop", None, 1)],
        prompt_tokens=1,
        created=0,
    )
    assert as_template(json.loads(ours)["response"]["body"]["choices"][0]["message"]) == [plain]
    openai = {"annotations": [], "refusal": None, "audio": None, "function_call": None}
    vllm = {"tool_calls": [], "reasoning_content": None, "reasoning": None}
    others = {"reasoning_details": [{"type": "x"}], "id": "msg_1", "prefix": False}
    assert as_template(plain | openai | vllm | others) == [plain]
    part = {"type": "text", "text": "x", "annotations": [], "cache_control": {"type": "ephemeral"}}
    assert as_template({"role": "user", "content": [part, "y"]}) == [
        {"role": "user", "content": "x\ny"}
    ]


def test_an_assistant_that_said_nothing_or_refused() -> None:
    for message in ({}, {"content": None}, {"content": None, "tool_calls": []}, {"content": []}):
        assert as_template({"role": "assistant", **message})[0]["content"] == ""
    for message in (
        {"content": None, "refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
    ):
        assert as_template({"role": "assistant", **message})[0]["content"] == "No."
    assert as_template({"role": "assistant", "content": "x", "refusal": ""})[0]["content"] == "x"


def test_thoughts_reach_the_template_under_both_names() -> None:
    for name in ("reasoning_content", "reasoning"):
        [message] = as_template({"role": "assistant", "content": "x", name: "because"})
        assert message["reasoning_content"] == message["reasoning"] == "because"
        assert as_template({"role": "user", "content": "x", name: "?"}) == [
            {"role": "user", "content": "x"}
        ]


def test_no_messages() -> None:
    row = chat("a")
    row["body"]["messages"] = []
    assert refused(row).param == "messages"
    del row["body"]["messages"]
    error = refused(row)
    assert (error.param, error.code) == ("messages", "missing_required_parameter")


def test_sampling_fields_are_obeyed() -> None:
    fields = {"max_tokens": 9, "temperature": 1, "top_p": 0.5, "top_k": 7, "seed": 3}
    sampling = parse(completion("a", stop_token_ids=[5, 5, 6], **fields)).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 1.0, 0.5)
    assert (sampling.top_k, sampling.seed) == (7, 3)
    assert sampling.stop_token_ids == (EOS, 5, 6)


def test_defaults_fill_what_is_left_out() -> None:
    service = make_service(temperature=0.3, top_p=0.9, top_k=4, max_tokens=11, seed=5)
    for row in (completion("a"), completion("a", temperature=None, top_p=None, max_tokens=None)):
        sampling = parse(row, service).sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.9, 4)
        assert (sampling.max_tokens, sampling.seed) == (11, derive_seed(5, "a"))


def test_seeds_depend_on_row_and_job_only() -> None:
    assert parse(completion("a"), number=1).sampling == parse(completion("a"), number=9).sampling
    assert derive_seed(0, "a") == 1605002263755683156
    assert len({derive_seed(job, name) for job in (0, 1) for name in ("a", "b", "1 a")}) == 6
    assert all(0 <= derive_seed(0, str(i)) < 2**63 for i in range(100))
    assert 0 <= parse(completion("a", seed=-(2**63))).sampling.seed < 2**63


def test_ignore_eos_leaves_the_rows_own_stop_tokens() -> None:
    assert parse(completion("a", ignore_eos=True, stop_token_ids=[4])).sampling.stop_token_ids == (
        4,
    )
    assert parse(completion("a", ignore_eos=False)).sampling.stop_token_ids == (EOS,)


@pytest.mark.parametrize("given", [-1, 0, 300, 10**15])
def test_top_k_of_everything_is_no_limit(given: int) -> None:
    assert parse(completion("a", top_k=given)).sampling.top_k == 0


def test_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert parse(completion("a", temperature=1e-9)).sampling.temperature == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", False),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", "3"),
        ("max_tokens", 10**40),
        ("ignore_eos", 1),
        ("model", 3),
        ("stop_token_ids", 3),
        ("stop_token_ids", [True]),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(field: str, value: Any) -> None:
    for row in (completion("a", **{field: value}), chat("a", **{field: value})):
        error = refused(row)
        assert error.status == 400
        assert (error.param or "").startswith(field)
        assert field in error.message


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_numbers_that_are_none(literal: str) -> None:
    line = with_body(temperature=0.5).replace(b"0.5", literal.encode())
    assert refused(line).status == 400


@pytest.mark.parametrize(
    ("field", "neutral", "meaningful"),
    [
        ("stream", False, True),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("structured_outputs", None, {"regex": "a"}),
        ("use_beam_search", False, True),
        ("bad_words", [], ["x"]),
        ("prompt_logprobs", None, 1),
        ("stream_options", None, {}),
    ],
)
def test_unsupported_fields_pass_at_neutral_values_only(
    field: str, neutral: Any, meaningful: Any
) -> None:
    for make in (completion, chat):
        assert parse(make("a", **{field: neutral})) == parse(make("a"))
        error = refused(make("a", **{field: meaningful}))
        assert (error.param, error.code) == (field, "unsupported_parameter")
        assert "not supported" in error.message


def test_tools_are_unsupported() -> None:
    assert parse(chat("a", tools=[], tool_choice="none"))
    assert refused(chat("a", tools=[{}])).code == "unsupported_parameter"
    assert parse(completion("a", tools=[]))
    assert refused(completion("a", tools=[{}])).code == "unsupported_parameter"
    assert refused(chat("a", lora_request={"lora_name": "x"})).param == "lora_request"


def test_labels_are_ignored() -> None:
    labels = {"user": "me", "metadata": {"x": 1}, "store": True, "service_tier": "flex"}
    for make in (chat, completion):
        assert parse(make("a", prompt_cache_retention="24h", **labels)) == parse(make("a"))


def test_unknown_fields_are_named() -> None:
    for row in (completion("a", temprature=1), chat("a", temprature=1)):
        assert refused(row).param == "temprature"
    assert refused(completion("a") | {"extra": 1}).param == "extra"
    assert len(refused(completion("a", **{"x" * 10_000: 1})).message) < 1000


def test_model_must_be_the_one_served() -> None:
    for name in ("tiny", "/models/tiny", None):
        assert parse(completion("a", model=name))
    error = refused(completion("a", model="gpt-4"))
    assert (error.status, error.code, error.type) == (404, "model_not_found", "not_found_error")


def test_max_completion_tokens_is_max_tokens() -> None:
    assert parse(chat("a", max_completion_tokens=4)).sampling.max_tokens == 4
    assert parse(chat("a", max_completion_tokens=4, max_tokens=4)).sampling.max_tokens == 4
    assert (
        refused(chat("a", max_completion_tokens=4, max_tokens=5)).param == "max_completion_tokens"
    )


def test_output_fills_the_limit_exactly() -> None:
    ten = list(range(10))
    assert parse(completion("a", ten, max_tokens=90)).sampling.max_tokens == 90
    assert parse(completion("a", ten)).sampling.max_tokens == 90
    assert parse(completion("a", ten)).open_ended
    assert parse(completion("a", ten), make_service(capacity=50)).sampling.max_tokens == 41
    assert parse(completion("a", [1] * 50), make_service(capacity=50)).sampling.max_tokens == 1
    assert parse(completion("a", ten), make_service(max_tokens=500)).sampling.max_tokens == 90
    assert parse(completion("a", [1] * 99)).sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("length", "asked", "capacity", "numbers"),
    [
        (10, 91, None, ("101", "10", "91", "100")),
        (100, None, None, ("101", "100")),
        (5000, None, None, ("5001", "5000", "100")),
        (10, 42, 50, ("52", "10", "42", "100", "50")),
        (51, None, 50, ("52", "51", "100", "50")),
    ],
)
def test_rows_that_cannot_fit_are_refused_with_the_arithmetic(
    length: int, asked: int | None, capacity: int | None, numbers: tuple[str, ...]
) -> None:
    row = completion("a", [1] * length, max_tokens=asked)
    error = refused(row, make_service(capacity=capacity))
    assert error.code == "context_length_exceeded"
    assert error.status == 400
    for number in numbers:
        assert f" {number} " in error.message.replace(".", " ").replace(",", " ").replace("(", " ")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'{"custom_id": "a"} x', "invalid_json"),
        (b"\xff\xfe\x00", "invalid_json"),
        (b'{"x": ' + b"[" * 200_000, "invalid_json"),
        (b"{}", "missing_required_parameter"),
    ],
)
def test_lines_that_are_no_rows(line: bytes, code: str) -> None:
    assert refused(line).code == code
    assert read_envelope(line, 0).custom_id is None


@pytest.mark.parametrize("custom_id", [None, 3, "", ["a"], {}])
def test_unusable_custom_ids(custom_id: Any) -> None:
    assert refused(completion(custom_id)).param == "custom_id"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"url": "/v1/embeddings"}, "url"),
        ({"url": 3}, "url"),
        ({"method": "GET"}, "method"),
        ({"body": "x"}, "body"),
        ({"body": None}, "body"),
    ],
)
def test_broken_outer_fields_keep_the_custom_id(change: dict[str, Any], param: str) -> None:
    line = json.dumps(completion("a") | change).encode()
    assert read_envelope(line, 0).custom_id == "a"
    assert refused(line).param == param


def test_bad_utf8_in_the_body_keeps_the_custom_id() -> None:
    line = with_body(prompt="PPP").replace(b"PPP", b"P\xffP")
    assert read_envelope(line, 0).custom_id == "a"
    assert refused(line).code == "invalid_json"


def test_of_repeated_keys_the_last_counts() -> None:
    line = with_body(temperature=1).replace(b'"temperature"', b'"temperature": 2, "temperature"')
    assert parse(line).sampling.temperature == 1
