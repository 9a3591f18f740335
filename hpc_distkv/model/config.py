"""What a model directory says about its model. No torch here, so that checking one is instant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.family import FAMILIES, Family
from hpc_distkv.model.rope import Rope

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings of generation_config.json; greedy if it does not ask for sampling."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a decoder, and the defaults its checkpoint ships with."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    """The checkpoint's: "float32", "bfloat16" or "float16"."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    fingerprint: str = ""
    """Hash of config.json and of the names and sizes of the weight files."""

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read a model directory in the Hugging Face layout.

        Raises ModelError, before any weight is read, for a directory that is none, and for an
        architecture or a setting that this decoder would compute wrongly.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(
                f"{folder} is no directory: --model takes a local model directory "
                "(config.json, *.safetensors, tokenizer.json)"
            )
        raw = read_json(folder / "config.json")
        weights = weight_files(folder)
        generation = {}
        if (folder / "generation_config.json").is_file():
            generation = read_json(folder / "generation_config.json")
        return _parse(raw, generation, folder / "config.json", _fingerprint(raw, weights))

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of K and V of one token in all layers, in `dtype` (the checkpoint's if None)."""
        return (
            2
            * self.num_layers
            * self.num_kv_heads
            * self.head_dim
            * dtype_bytes(dtype or self.dtype)
        )

    @property
    def num_parameters(self) -> int:
        """Number of weights, biases left out; a tied head counts once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    @property
    def attention_tokens(self) -> float:
        """Context length at which a token's attention costs as much as its linear layers."""
        return self.num_parameters / (2 * self.num_layers * self.num_heads * self.head_dim)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value of the dtype named `dtype`; ModelError for a dtype not supported."""
    if dtype not in DTYPE_BYTES:
        raise ModelError(
            f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPE_BYTES)}"
        )
    return DTYPE_BYTES[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing: give the directory of a complete Hugging Face checkpoint"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, sorted; ModelError if it has none.

    With an index, exactly the files the index names. Pickled weights are refused: loading them
    would run whatever code they contain.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index} has no weight_map: download it again")
        files = sorted({folder / str(name) for name in names.values()})
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file} is missing, but {index.name} names it: download it again")
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has safetensors files, but no {index.name}: download it again")
    if any(file for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has only pickled weights, which can run code when loaded; convert them: "
            "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ModelError(f"{folder} has no model.safetensors: the weights are missing")


def _fingerprint(raw: Mapping[str, Any], weights: list[Path]) -> str:
    sizes = [(file.name, file.stat().st_size) for file in weights]
    text = json.dumps([raw, sizes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse(
    raw: Mapping[str, Any], generation: Mapping[str, Any], path: Path, fingerprint: str
) -> ModelConfig:
    where = str(path)
    family = _family(raw, where)
    whole, flag = partial(_whole, raw, where), partial(_flag, raw, where)
    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    kv_heads = whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = whole("head_dim", None if hidden % heads else hidden // heads)
    if head_dim % 2:
        raise ModelError(f"{where}: head_dim must be even for rotary embedding, not {head_dim}")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in DTYPE_BYTES:
        raise ModelError(
            f"{where}: dtype {dtype!r} is not supported; supported are {', '.join(DTYPE_BYTES)}"
        )
    return ModelConfig(
        family=family,
        num_layers=whole("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=whole("vocab_size"),
        max_position=whole("max_position_embeddings"),
        rms_norm_eps=_positive(raw, where, "rms_norm_eps", 1e-6),
        rope=Rope.from_config(raw, where),
        attention_bias=flag("attention_bias", family.attention_bias),
        mlp_bias=flag("mlp_bias", family.mlp_bias),
        tie_embeddings=flag("tie_word_embeddings", family.tie_embeddings),
        dtype=dtype,
        eos_token_ids=_token_ids("eos_token_id", where, generation, raw),
        bos_token_id=next(iter(_token_ids("bos_token_id", where, raw)), None),
        generation=_generation_defaults(generation),
        fingerprint=fingerprint,
    )


def _family(raw: Mapping[str, Any], where: str) -> Family:
    """The row of the checkpoint's architecture, after a check that the row covers all it asks."""
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    family = FAMILIES.get(str(name))
    if family is None:
        raise ModelError(
            f"{where}: architecture {name!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    for key, allowed in family.required.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ModelError(
                f"{where}: {key} = {raw[key]!r} is not supported for {name}; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
    return family


def _whole(raw: Mapping[str, Any], where: str, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {key} must be a positive whole number, not {value!r}")
    return value


def _positive(raw: Mapping[str, Any], where: str, key: str, default: float) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{where}: {key} must be a positive number, not {value!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], where: str, key: str, default: bool) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{where}: {key} must be true or false, not {value!r}")
    return default if value is None else value


def _token_ids(key: str, where: str, *sources: Mapping[str, Any]) -> tuple[int, ...]:
    """The token ids under `key` in all `sources`, each a number or a list, without repeats."""
    ids: list[int] = []
    for source in sources:
        value = source.get(key)
        for item in value if isinstance(value, list) else [value]:
            if item is None or item in ids:
                continue
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise ModelError(f"{where}: {key} must be token ids, not {value!r}")
            ids.append(item)
    return tuple(ids)


def _generation_defaults(generation: Mapping[str, Any]) -> GenerationDefaults:
    """Greedy unless do_sample is true, as transformers reads the file. Raises ModelError."""

    def setting(key: str, default: float, lowest: float, highest: float) -> float:
        value = generation.get(key)
        value = default if value is None else value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not lowest <= value <= highest:
            raise ModelError(
                f"generation_config.json: {key} must be a number from {lowest:g} to {highest:g}, "
                f"not {value!r}"
            )
        return float(value)

    repetition_penalty = setting("repetition_penalty", 1.0, 1e-6, 1e6)
    if not generation.get("do_sample"):
        return GenerationDefaults(repetition_penalty=repetition_penalty)
    return GenerationDefaults(
        temperature=setting("temperature", 1.0, 0, 100),
        top_p=setting("top_p", 1.0, 1e-6, 1),
        top_k=max(0, int(setting("top_k", 50, -1, 1e9))),
        min_p=setting("min_p", 0.0, 0, 1),
        repetition_penalty=repetition_penalty,
    )
