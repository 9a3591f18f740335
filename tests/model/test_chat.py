"""Tokenizer and chat template against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_distkv.model import tokenizer as tokenizer_module
from hpc_distkv.model.chat import ChatTemplate
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.tokenizer import Tokenizer

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in <b>one</b> word.\n"},
        {"role": "user", "content": "  Größe? 数 🙂"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Why?"},
    ],
]


def chat_of(path: Path) -> ChatTemplate:
    return ChatTemplate(path, Tokenizer(path))


@pytest.fixture
def writable(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's tokenizer that a test may change."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / name)
    return tmp_path


def with_template(path: Path, template: Any) -> ChatTemplate:
    file = path / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    raw["chat_template"] = template
    file.write_text(json.dumps(raw))
    return chat_of(path)


@pytest.mark.parametrize("model", ["tiny_model", "demo_model"])
@pytest.mark.parametrize("messages", CHATS, ids=["one", "many"])
def test_prompts_equal_those_of_transformers(
    model: str, messages: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    path = request.getfixturevalue(model)
    theirs = AutoTokenizer.from_pretrained(path)
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ours = ChatTemplate(path, Tokenizer(path))(messages)
    assert ours == prompt["input_ids"]
    assert ours[0] == theirs.bos_token_id
    assert ours[1] != theirs.bos_token_id


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_tokens(tiny_model: Path, text: str) -> None:
    tokenizer = Tokenizer(tiny_model)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_knows_its_end(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode([0, *tokenizer.encode("Hello"), 1]) == "Hello"


def test_the_tokenizer_of_another_model_is_refused_and_a_padded_vocabulary_is_not(
    writable: Path,
) -> None:
    for size in (300, 320):
        Tokenizer(writable, size)
    with pytest.raises(ModelError, match="of another model: it has ids up to 299, but vocab_size"):
        Tokenizer(writable, 299)
    file = writable / "tokenizer.json"
    raw = json.loads(file.read_text())
    words = raw["model"]["vocab"]
    last = next(word for word, id in words.items() if id == 299)
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 299, "content": last})
    file.write_text(json.dumps(raw))
    Tokenizer(writable, 299)  # a token that was added, and that the model never gets


def test_half_a_surrogate_pair_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="Unicode"):
        Tokenizer(tiny_model).encode("a\ud83d")


def test_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


class Panic(BaseException):
    """As a library in Rust raises."""


@pytest.mark.parametrize(
    ("raised", "heard"), [(Panic, ModelError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_tokenizer_that_panics_is_a_broken_one(
    raised: type[BaseException],
    heard: type[BaseException],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_module, "FastTokenizer", Mock(**{"from_str.side_effect": raised}))
    with pytest.raises(heard):
        Tokenizer(tiny_model)


def test_the_words_of_a_refusing_template_reach_the_user(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="unknown role robot"):
        chat_of(tiny_model)([{"role": "robot", "content": "beep"}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "no role"}],
    ],
)
def test_malformed_messages_are_model_errors(
    tiny_model: Path, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(ModelError):
        chat_of(tiny_model)(messages)


def test_no_template_matters_only_for_chats(writable: Path) -> None:
    chat = with_template(writable, None)
    with pytest.raises(ModelError, match=r"no chat template.*/v1/completions"):
        chat(CHATS[0])


def test_named_templates_use_the_default(writable: Path) -> None:
    named = [{"name": "default", "template": "yes"}, {"name": "tool_use", "template": "no"}]
    assert with_template(writable, named).render(CHATS[0]) == "yes"
    with pytest.raises(ModelError, match="tool_use"):
        with_template(writable, named[1:])


def test_template_file_goes_before_the_settings(writable: Path) -> None:
    (writable / "chat_template.jinja").write_text("from the file")
    assert chat_of(writable).render(CHATS[0]) == "from the file"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n  {% if m %}\nx\n  {% endif %}\n{% endfor %}\n", "x\n"),
        ("{{ ['<ä>'] | tojson }}", '["<ä>"]'),
        (
            "{{ {'b': [1, 'ä']} | tojson(indent=2) }}",
            json.dumps({"b": [1, "ä"]}, indent=2, ensure_ascii=False),
        ),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools is none %}plain{% endif %}", "plain"),
    ],
)
def test_templates_find_what_they_are_written_for(writable: Path, template: str, text: str) -> None:
    assert with_template(writable, template).render(CHATS[0]) == text


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ nothing.at.all }}"]
)
def test_templates_cannot_leave_the_sandbox(writable: Path, template: str) -> None:
    with pytest.raises(ModelError):
        with_template(writable, template).render(CHATS[0])


def test_a_broken_template_is_found_at_the_start(writable: Path) -> None:
    with pytest.raises(ModelError, match="does not compile"):
        with_template(writable, "{% for %}")
