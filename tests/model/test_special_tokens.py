"""Tokens that only files beside tokenizer.json name, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hpc_distkv.batch.input.service import Limits, SamplingDefaults, Service
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.tokenizer import Tokenizer

TEXT = "Hi <|tool|> there, <|think|>why? <|think|> <|user|>  <|tool|>\n<s> end</s>"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TOOL = {"content": "<|tool|>", "special": True, **FLAGS}
THINK = {"content": "<|think|>", "special": False, **FLAGS}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's small files, whose tokenizer has the ids 0 to 299."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | changes))


def in_decoder(path: Path) -> None:
    edit(path / "tokenizer_config.json", added_tokens_decoder={"301": THINK, "300": TOOL})


def with_other_flags(path: Path) -> None:
    stripping = {**TOOL, "lstrip": True, "rstrip": True}
    edit(path / "tokenizer_config.json", added_tokens_decoder={"300": stripping, "301": THINK})


def in_added_tokens(path: Path) -> None:
    edit(path / "added_tokens.json", **{"<|think|>": 301, "<|tool|>": 300})
    edit(path / "special_tokens_map.json", extra_special_tokens=["<|tool|>"])


def as_extra(path: Path) -> None:
    edit(path / "tokenizer_config.json", extra_special_tokens=["<|tool|>", "<|think|>"])


def as_additional(path: Path) -> None:
    edit(path / "tokenizer_config.json", additional_special_tokens=[TOOL["content"]])


def as_named(path: Path) -> None:
    edit(path / "tokenizer_config.json", extra_special_tokens={"tool_token": "<|tool|>"})


def as_pad(path: Path) -> None:
    edit(path / "special_tokens_map.json", pad_token=TOOL, eos_token="<|think|>")


def of_the_vocabulary(path: Path) -> None:
    """A word of the tokenizer that becomes a token of its own."""
    edit(path / "tokenizer_config.json", additional_special_tokens=["th"])


PLACES = (
    *(in_decoder, with_other_flags, in_added_tokens, as_extra, as_additional, as_named, as_pad),
    of_the_vocabulary,
)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_tokens_named_beside_the_tokenizer_are_those_of_transformers(
    place: Callable[[Path], None], model: Path
) -> None:
    plain = Tokenizer(model).encode(TEXT)
    place(model)
    ours, theirs = Tokenizer(model), AutoTokenizer.from_pretrained(model)
    ids = ours.encode(TEXT)
    assert ids == theirs.encode(TEXT)
    assert ids != plain
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id


def test_an_extra_token_of_the_older_map_is_no_text(model: Path) -> None:
    edit(model / "added_tokens.json", **{"<|tool|>": 300})
    edit(model / "special_tokens_map.json", additional_special_tokens=["<|tool|>"])
    tokenizer = Tokenizer(model)
    assert tokenizer.encode("<|tool|>") == [300]
    assert tokenizer.decode([300]) == ""


def test_a_token_that_would_get_another_id_is_refused(model: Path) -> None:
    edit(model / "tokenizer_config.json", added_tokens_decoder={"310": TOOL})
    with pytest.raises(ModelError, match=r"'<\|tool\|>' has id 310, but .* gets 300.*save_pre"):
        Tokenizer(model)


def test_every_file_that_names_an_end_ends_answers(model: Path) -> None:
    """As of a base model that was tuned to chat: its config.json still has the base model's."""
    edit(model / "config.json", eos_token_id=1)
    edit(model / "generation_config.json", eos_token_id=[4, 5000])
    edit(model / "tokenizer_config.json", eos_token="<|user|>")
    config = ModelConfig.from_dir(model)
    service = Service.from_dir(model, config, Limits(100), SamplingDefaults())
    assert set(service.eos_ids) == {1, 3, 4}
