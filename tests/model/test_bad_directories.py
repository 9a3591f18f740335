"""Model directories that are damaged in any way: each loads, or is refused in one line, soon."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hpc_distkv.batch.input.service import Limits, SamplingDefaults, Service
from hpc_distkv.model import files, template_sandbox
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.files import read_json, read_text
from hpc_distkv.model.fingerprint import model_fingerprint, weights_digest
from hpc_distkv.model.tokenizer import Tokenizer
from hpc_distkv.model.weights import load_decoder, random_decoder

SECONDS = 2.0
"""Of the processor's time for a directory. A sound one takes a few hundredths."""
CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER, SETTINGS, JINJA = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
DEEP = "[" * 100_000
DIGITS = "9" * 5000

Damage = Callable[[Path], object]


def says(name: str, content: str | bytes) -> Damage:
    """A file that has this content."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def has(name: str, text: str) -> Damage:
    """A JSON file with these entries, spelled out, behind its own: the last one of a key counts."""

    def damage(folder: Path) -> None:
        file = folder / name
        before = file.read_text().rstrip()[:-1].rstrip() if file.exists() else "{"
        comma = "" if before == "{" else ","
        file.write_text(f"{before}{comma} {text}}}")

    return damage


def is_no_file(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def header(text: str, length: int | None = None) -> Damage:
    """Weights whose header is `text`."""
    raw = text.encode()
    return says(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw)


def index(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "1.safetensors")
        (folder / INDEX).write_text(text)

    return damage


def words(**changes: Any) -> Damage:
    """A tokenizer.json with other values at its top."""

    def damage(folder: Path) -> None:
        raw = json.loads((folder / TOKENIZER).read_text())
        (folder / TOKENIZER).write_text(json.dumps(raw | changes))

    return damage


SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
)
BAD_SIZES = ("0", "-1", "1e9", str(10**9), str(10**30), DIGITS, '"64"', "NaN", "[64]", "true")
NUMBERS = ("rms_norm_eps", "rope_theta", "temperature", "top_k", "repetition_penalty")
BAD_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", str(10**400), '"x"', "{}", "-1")
SMALL = (CONFIG, GENERATION, TOKENIZER, SETTINGS, "special_tokens_map.json", "added_tokens.json")
BAD_TEXTS = {
    "empty": "",
    "cut": '{"a": ',
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "deep": '{"a": ' + DEEP,
    "digits": f'{{"a": {DIGITS}}}',
    "no text": b"\xff\xfe{\x00",
    "zeros": bytes(100),
}
NO_FILES: dict[str, Callable[[Path], object]] = {
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}

DAMAGES: dict[str, Damage] = {
    **{f"{n}: {kind}": says(n, text) for n in SMALL for kind, text in BAD_TEXTS.items()},
    **{
        f"{n} is {kind}": is_no_file(n, make)
        for n in (*SMALL, WEIGHTS, INDEX, JINJA)
        for kind, make in NO_FILES.items()
    },
    **{f"{k} = {v[:12]}": has(CONFIG, f'"{k}": {v}') for k in SIZES for v in BAD_SIZES},
    **{
        f"{k} = {v[:12]}": has(GENERATION if k in NUMBERS[2:] else CONFIG, f'"{k}": {v}')
        for k in NUMBERS
        for v in BAD_NUMBERS
    },
    **{f"eos {v[:9]}": has(CONFIG, f'"eos_token_id": {v}') for v in (str(10**30), "[[1]]", "{}")},
    "do_sample": has(GENERATION, '"do_sample": "yes", "temperature": 0.5'),
    "layers and experts": has(
        CONFIG,
        '"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4000, "num_experts": 4000,'
        '"moe_intermediate_size": 1, "num_experts_per_tok": 1',
    ),
    "architectures": has(CONFIG, '"architectures": [{"a": []}]'),
    "dtype": has(CONFIG, '"dtype": ["float32"]'),
    "layer_types": has(CONFIG, '"layer_types": "full_attention"'),
    "rope list": has(CONFIG, '"rope_scaling": [1]'),
    "rope type": has(CONFIG, '"rope_scaling": {"rope_type": ["yarn"]}'),
    "rope factor": has(CONFIG, '"rope_scaling": {"rope_type": "linear", "factor": 1e300}'),
    "rope stretch": has(CONFIG, '"rope_scaling": {"rope_type": "linear", "factor": 1e12}'),
    "rope original": has(
        CONFIG,
        '"rope_scaling": {"rope_type": "yarn", "factor": 4, '
        '"original_max_position_embeddings": 1e-9}',
    ),
    "rope theta 1": has(
        CONFIG, '"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_theta": 1'
    ),
    "rope slow": has(
        CONFIG, '"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_slow": 5e-324}'
    ),
    "rope fast": has(
        CONFIG, '"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 1e30}'
    ),
    "rope part": has(CONFIG, '"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 1e-6'),
    "half a surrogate": has(CONFIG, '"architectures": ["\\ud83d"]'),
    "lines": has(CONFIG, '"hidden_act": "a\\nb\\u001b[31m"'),
    "index outside": index('{"weight_map": {"a": "../1.safetensors"}}'),
    "index absolute": index('{"weight_map": {"a": "/etc/passwd"}}'),
    "index up": index('{"weight_map": {"a": ".."}}'),
    "index empty name": index('{"weight_map": {"a": ""}}'),
    "index zero": index('{"weight_map": {"a": "a\\u0000b"}}'),
    "index long name": index(json.dumps({"weight_map": {"a": "x" * 5000}})),
    "index number": index('{"weight_map": {"a": 5}}'),
    "index list": index('{"weight_map": ["1.safetensors"]}'),
    "index nothing": index("{}"),
    "index of tensors that are not there": index('{"weight_map": {"nowhere": "1.safetensors"}}'),
    "weights empty": says(WEIGHTS, b""),
    "weights zeros": says(WEIGHTS, bytes(1000)),
    "weights large header": header("{}", length=2**63),
    "weights header beyond": header("{}", length=10**6),
    "weights list": header("[]"),
    "weights deep": header(DEEP),
    "weights sizes": header(
        '{"model.norm.weight": {"dtype": "F32", "shape": [1000000000000],'
        ' "data_offsets": [0, 4000000000000]}}'
    ),
    "weights offsets": header(
        '{"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [-256, 0]}}'
    ),
    "weights offsets beyond numbers": header(
        '{"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 1e999]}}'
    ),
    "tokenizer without model": words(model=None),
    "tokenizer of a strange type": words(model={"type": "Strange"}),
    "tokenizer merges": words(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
    "tokenizer ids": words(
        model={"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"}
    ),
    "tokenizer without a vocabulary": words(
        model={"type": "Unigram", "vocab": [], "unk_id": 7}, added_tokens=[]
    ),
    "tokenizer regex": words(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed"}
    ),
    "decoder list": has(SETTINGS, '"added_tokens_decoder": [1]'),
    "decoder id": has(SETTINGS, '"added_tokens_decoder": {"x": {"content": "<x>"}}'),
    "decoder other id": has(SETTINGS, '"added_tokens_decoder": {"999": {"content": "<x>"}}'),
    "decoder token": has(SETTINGS, '"added_tokens_decoder": {"300": {"content": 5}}'),
    "decoder flags": has(
        SETTINGS, '"added_tokens_decoder": {"300": {"content": "<x>", "lstrip": "yes"}}'
    ),
    "decoder surrogate": has(SETTINGS, '"added_tokens_decoder": {"300": {"content": "\\ud83d"}}'),
    "extra tokens": has(SETTINGS, '"extra_special_tokens": [5, null, {}, ""]'),
    "eos surrogate": has(SETTINGS, '"eos_token": "\\ud83d"'),
    "added ids": says("added_tokens.json", '{"<x>": "y"}'),
    "template number": has(SETTINGS, '"chat_template": 5'),
    "template list": has(SETTINGS, '"chat_template": [5, {"name": ["default"]}]'),
    "template names": has(SETTINGS, '"chat_template": [{"name": null}, {"name": "a"}]'),
    "template cut": says(JINJA, "{% for"),
    "template bytes": says(JINJA, b"\xff\xfe"),
    "template surrogate": has(SETTINGS, '"chat_template": "\\ud83d"'),
    "template endless": says(
        JINJA, "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "template raises": says(JINJA, "{{ raise_exception('a\\ud83d\\n' * 10**6) }}"),
}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def use(folder: Path) -> None:
    """All that a job does with a model directory, its weights as random ones too."""
    config = ModelConfig.from_dir(folder)
    tokenizer = Tokenizer(folder, config.vocab_size)
    limits = Limits(config.longest())
    service = Service.from_dir(folder, config, limits, SamplingDefaults(), tokenizer)
    random_decoder(config, "float32")
    load_decoder(folder, config, "float32")
    model_fingerprint(folder, config, tokenizer, service.eos_ids, "float32")
    service.tokenizer.encode("Hello")
    service.chat([{"role": "user", "content": "Hello"}], most=100)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line_or_loads(
    damage: Damage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.1)
    damage(model)
    began = time.process_time()
    try:
        use(model)
    except ModelError as error:
        message = str(error)
        message.encode()
        assert message.isprintable()
        assert 20 < len(message) < 1200
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize(
    "read",
    [read_text, read_json, lambda file: weights_digest([file])],
    ids=["text", "json", "weights"],
)
def test_what_becomes_a_pipe_after_a_look_keeps_nobody_waiting(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "has_file", lambda path: True)
    os.mkfifo(tmp_path / "pipe")
    said: list[Exception] = []

    def reading() -> None:
        try:
            read(tmp_path / "pipe")
        except (ModelError, OSError) as error:
            said.append(error)

    thread = threading.Thread(target=reading, daemon=True)
    thread.start()
    thread.join(5)
    assert "not a regular file" in str(said)


def test_a_file_that_cannot_be_opened_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").write_text("{}")
    (tmp_path / CONFIG).symlink_to("target")
    monkeypatch.setattr(files, "open_regular", Mock(side_effect=PermissionError(13, "denied")))
    with pytest.raises(ModelError, match=r"config.json cannot be read: denied"):
        files.read_config(tmp_path)


def test_a_sound_directory_loads(model: Path) -> None:
    use(model)
