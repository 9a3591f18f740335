"""The files of a model directory. No torch here, so that checking one is instant."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from hpc_distkv.model.errors import ModelError
from hpc_distkv.regular import open_regular

LARGEST_TEXT = 1 << 30
"""Bytes of a file that is read whole; tokenizer.json files have at most some 50 MB."""


def has_file(path: Path) -> bool:
    """Whether there is a file `path`. Raises ModelError for what has the name and cannot be read
    as one, such as a pipe, or a link that leads nowhere."""
    try:
        open_regular(path).close()
    except OSError as error:
        if not os.path.lexists(path):
            return False
        if path.is_symlink() and not os.path.exists(path):
            raise ModelError(
                f"{path} is a link to {os.readlink(path)}, which is not there: copy the directory "
                "with what its links lead to (cp -rL)"
            ) from None
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    return True


def read_text(path: Path) -> str:
    """The text in `path`; ModelError if it is missing, unreadable, or larger than any such file."""
    if not has_file(path):
        raise ModelError(
            f"{path} is missing: give the directory of a complete Hugging Face checkpoint"
        )
    try:
        with TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_TEXT:
                raise ModelError(f"{path} is larger than {LARGEST_TEXT} bytes: download it again")
            return file.read()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is missing or malformed."""
    try:
        value = json.loads(read_text(path))
    except ValueError as error:  # also for a number of thousands of digits
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not valid JSON ({error}): download it again") from error
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply: download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`, but empty if there is no such file."""
    return read_json(path) if has_file(path) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises ModelError, also for the directories that are
    often taken for one."""
    file = folder / "config.json"
    if not has_file(file):
        if has_file(folder / "adapter_config.json"):
            raise ModelError(
                f"{folder} is an adapter (adapter_config.json), no model: merge it into its base "
                "model (peft: merge_and_unload().save_pretrained(NEW_DIR))"
            )
        if os.path.isdir(folder / "snapshots"):
            raise ModelError(
                f"{folder} is an entry of the hub's cache: give the directory of one revision, "
                f"{folder}/snapshots/…"
            )
    return read_json(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, sorted; ModelError if it has none.

    With an index, exactly the files the index names. Pickled weights are refused: loading them
    would run whatever code they contain.
    """
    index = folder / "model.safetensors.index.json"
    if has_file(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index} has no weight_map: download it again")
        files = sorted({_beside(index, name) for name in names.values()})
        for file in files:
            if not has_file(file):
                raise ModelError(f"{file} is missing, but {index.name} names it: download it again")
        return files
    single = folder / "model.safetensors"
    if has_file(single):
        return [single]
    if any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has safetensors files, but no {index.name}: download it again")
    if any(file for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has only pickled weights, which can run code when loaded; convert them: "
            "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ModelError(f"{folder} has no model.safetensors: the weights are missing")


def _beside(index: Path, name: Any) -> Path:
    """The file of that name in the directory of `index`. Raises ModelError for any other place."""
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise ModelError(f"{index} names {name!r}, which is no file beside it: download it again")
    return index.with_name(name)


def fingerprint(raw: Mapping[str, Any], weights: list[Path]) -> str:
    """Hash of a config.json and of the names and sizes of the weight files."""
    sizes = [(file.name, file.stat().st_size) for file in weights]
    text = json.dumps([raw, sizes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings of generation_config.json; greedy if it does not ask for sampling."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, generation: Mapping[str, Any]) -> GenerationDefaults:
        """From the file's keys: greedy unless do_sample is true, as transformers reads them. Raises
        ModelError."""

        def setting(key: str, default: float, lowest: float, highest: float) -> float:
            value = generation.get(key)
            value = default if value is None else value
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not lowest <= value <= highest:
                raise ModelError(
                    f"generation_config.json: {key} must be a number from {lowest:g} to "
                    f"{highest:g}, not {value!r}"
                )
            return float(value)

        sampled = cls(
            temperature=setting("temperature", 1.0, 0, 100),
            top_p=setting("top_p", 1.0, 1e-6, 1),
            top_k=max(0, int(setting("top_k", 50, -1, 1e9))),
            min_p=setting("min_p", 0.0, 0, 1),
            repetition_penalty=setting("repetition_penalty", 1.0, 1e-6, 1e6),
        )
        if generation.get("do_sample"):
            return sampled
        return cls(repetition_penalty=sampled.repetition_penalty)
