"""What tells two models apart, whatever their directories are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from hpc_distkv.batch.input.service import end_ids
from hpc_distkv.model import fingerprint
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.fingerprint import model_fingerprint, weights_digest
from hpc_distkv.model.special_tokens import TOKEN_FIELDS
from hpc_distkv.model.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def of(path: Path, dtype: str = "float32") -> dict[str, Any]:
    config, tokenizer = ModelConfig.from_dir(path), Tokenizer(path)
    return model_fingerprint(path, config, tokenizer, end_ids(config, tokenizer), dtype)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_a_bit(path: Path) -> None:
    """Of one norm, as the smallest of updates does."""
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def change_the_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")


def change_a_word(path: Path) -> None:
    raw = json.loads((path / "tokenizer.json").read_text())
    words = raw["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (path / "tokenizer.json").write_text(json.dumps(raw))


def add_a_special_token(path: Path) -> None:
    edit(path / "tokenizer_config.json", extra_special_tokens=["<|tool|>"])


def change_an_end(path: Path) -> None:
    edit(path / "generation_config.json", eos_token_id=5)


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": change_a_bit,
    "chat_template": change_the_template,
    "tokenizer": change_a_word,
    "special_tokens": add_a_special_token,
    "eos_token_ids": change_an_end,
    "config": lambda path: edit(path / "config.json", rms_norm_eps=1e-4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_tokens_has_an_entry_of_its_own(name: str, model: Path) -> None:
    before = of(model)
    CHANGES[name](model)
    after = of(model)
    assert {key for key in before if before[key] != after[key]} == {name}


def test_an_end_that_the_tokenizer_alone_names_counts(model: Path) -> None:
    before = of(model)
    edit(model / "tokenizer_config.json", eos_token="<|user|>")
    after = of(model)
    assert set(after["eos_token_ids"]) - set(before["eos_token_ids"]) == {3}


@pytest.mark.parametrize("field", TOKEN_FIELDS)
def test_how_a_token_is_found_counts(field: str, model: Path) -> None:
    token = dict.fromkeys(TOKEN_FIELDS, False) | {"content": "<|tool|>"}
    edit(model / "tokenizer_config.json", added_tokens_decoder={"300": token})
    before = of(model)
    token[field] = "<|other|>" if field == "content" else True
    edit(model / "tokenizer_config.json", added_tokens_decoder={"300": token})
    after = of(model)
    assert {key for key in before if before[key] != after[key]} == {"special_tokens"}


def test_all_that_the_library_says_of_a_token_is_known() -> None:
    assert set(AddedToken("a").__getstate__()) == set(TOKEN_FIELDS)


def test_settings_are_named_and_those_of_their_default_are_not(model: Path) -> None:
    edit(model / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config = of(model)["config"]
    assert config["rope"] == {"theta": 5e5}
    assert config["family"] == "LlamaForCausalLM"
    assert "num_experts" not in config


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    before = of(model)
    copy = Path(shutil.copytree(model, tmp_path / "another name"))
    edit(copy / "config.json", transformers_version="9.9", _name_or_path="org/name", use_cache=True)
    edit(copy / "tokenizer_config.json", model_max_length=10**30, tokenizer_class="Other")
    assert of(copy) == before
    assert of(copy, "bfloat16")["dtype"] != before["dtype"]


def test_weights_cut_into_other_files_are_the_same(model: Path) -> None:
    before = of(model)
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    index = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, model / f"{number}.safetensors")
        index |= dict.fromkeys(names, f"{number}.safetensors")
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert of(model) == before


@pytest.mark.parametrize("most", [1, 10, 1000])
def test_how_much_is_read_has_a_bound(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with one place of each tensor too, a change of all of its numbers is seen."""
    tensors = {f"t{n}": torch.randn(300, 100) for n in range(20)}
    save_file(tensors, tmp_path / WEIGHTS)
    read = []
    look = fingerprint.os.pread

    def counted(fd: int, size: int, offset: int) -> bytes:
        read.append(size)
        return look(fd, size, offset)

    monkeypatch.setattr(fingerprint, "SAMPLES", most)
    monkeypatch.setattr(fingerprint.os, "pread", counted)
    before = weights_digest([tmp_path / WEIGHTS])
    places = min(max(1, most // 20), fingerprint.MOST_SAMPLES)
    assert len(read) == 2 + 20 * places  # two for the header
    assert max(read[2:]) == fingerprint.SAMPLE
    tensors["t7"] *= 1.01
    save_file(tensors, tmp_path / WEIGHTS)
    assert weights_digest([tmp_path / WEIGHTS]) != before


def test_of_too_many_tensors_some_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "MOST_TENSORS", 50)
    tensors = {f"t{n}": torch.randn(2, 3) for n in range(100)}
    save_file(tensors, tmp_path / WEIGHTS)
    before = weights_digest([tmp_path / WEIGHTS])
    seen = 0
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, tmp_path / "changed.safetensors")
        seen += weights_digest([tmp_path / "changed.safetensors"]) != before
    assert seen == 50
    save_file({**tensors, "t0": torch.randn(3, 2)}, tmp_path / WEIGHTS)
    assert weights_digest([tmp_path / WEIGHTS]) != before


def of_header(offsets: str = "[0,4]", shape: str = "[1]") -> bytes:
    """Weights of one number."""
    about = f'{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    return len(about).to_bytes(8, "little") + about + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        *(of_header(offsets=value) for value in ("[0,1e999]", "[NaN,4]", "[-1,-1]", "[4]", "7")),
        *(of_header(shape=value) for value in ("[1e999]", "[NaN]", '["x"]', "{}x", "null")),
        b"",
        b"never read",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (200).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{\xff",
        (12).to_bytes(8, "little") + b'{"t": [1,2]}',
        (65).to_bytes(8, "little")
        + b'{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}  ',
    ],
)
def test_damaged_weights_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="download it again"):
        weights_digest([tmp_path / WEIGHTS])
