"""The files of a model directory. No torch here, so that checking one is instant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_distkv.model.errors import ModelError


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


def fingerprint(raw: Mapping[str, Any], weights: list[Path]) -> str:
    """Hash of a config.json and of the names and sizes of the weight files."""
    sizes = [(file.name, file.stat().st_size) for file in weights]
    text = json.dumps([raw, sizes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
