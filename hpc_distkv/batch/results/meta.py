"""The job that a results file belongs to: `<output>.meta.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.side_files import meta_path
from hpc_distkv.regular import read_regular, replace_file

FORMAT = 1
"""Version of the results file and of what resuming relies on."""

INPUT = "input"
"""Field of the meta file: the batch file."""
ERRORS = "errors"
"""The file of the error rows, if they are not among the results."""
SHARD = "shard"
"""The part of the input that the results answer."""
DROPPED = "dropped_by"
"""The last Slurm job that dropped what the file held, or its error rows."""
MODEL = "model"
"""All of the model that decides tokens."""
FORMER = "model_fingerprint"
"""What earlier versions wrote under `MODEL`: a hash of config.json and of the sizes of weights."""
SERVED = "served_model"
"""The name of the model."""
FREE = {INPUT, ERRORS, DROPPED, FORMER, SERVED}
"""What a rerun may change."""
_DIFFER = {
    f"{MODEL}.tokenizer": "tokenizer.json",
    f"{MODEL}.special_tokens": "what is beside tokenizer.json about special tokens",
    f"{MODEL}.chat_template": "the chat template",
    f"{MODEL}.weights": "the content of the weights",
}
"""Fields that are hashes → what has changed if they differ."""
_CALLED = {f"{MODEL}.dtype": "--dtype", f"{MODEL}.eos_token_ids": "eos_token_id"}
"""Fields that users know under another name."""

_RESTART = "Use --overwrite to start again, or another output."


def describe(
    fingerprint: Mapping[str, Any],
    source: str | os.PathLike[str] | None,
    errors: Path | None,
    job: str | None,
) -> dict[str, Any]:
    """The record of a job; the arguments are those of `Opening.look`. `job`: Slurm's id of a job
    that drops lines."""
    meta: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
    if source is not None:
        meta[INPUT] = str(Path(source).resolve())
    if errors is not None:
        meta[ERRORS] = str(errors.resolve())
    if job:
        meta[DROPPED] = job
    return meta


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Replace the record of the job of the results file at `path`. Raises OSError."""
    # Not by msgspec, which takes no path that is not UTF-8.
    replace_file(meta_path(path), [json.dumps(meta, indent=2).encode(), b"\n"])


def check_meta(path: Path, before: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Raise JournalError if `before`, the record of the job that wrote the results, is none, or
    differs from the one that is `wanted`."""
    if before is None:
        raise JournalError(
            f"{path} is not empty and has no {meta_path(path).name} beside it, so it is not known "
            f"which job wrote it. {_RESTART}"
        )
    if found := differences(before, wanted):
        raise JournalError(f"{path} holds results of another job: {'; '.join(found)}. {_RESTART}")


def note_meta(path: Path, wanted: Mapping[str, Any]) -> None:
    """Bring the record of a resumed job up to date. Raises OSError."""
    before, after = read_meta(path), dict(wanted)
    if DROPPED in before:
        after.setdefault(DROPPED, before[DROPPED])
    if after != before:
        write_meta(path, after)


def check_errors(path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on without the file of error rows, which would be answered again. Raises
    JournalError and OSError."""
    errors = before.get(ERRORS)
    if errors and errors != wanted.get(ERRORS) and Path(errors).exists():
        raise JournalError(
            f"the error rows of {path} are in {errors}: give --error-file {errors}, or remove that "
            "file to answer them again."
        )


def read_meta(path: Path) -> dict[str, Any]:
    """The record of the job that wrote the results file at `path`. Raises JournalError, and OSError
    if there is none."""
    meta = meta_path(path)
    try:
        found: dict[str, Any] = msgspec.convert(json.loads(read_regular(meta)), dict[str, Any])
        _check(found)
    except (ValueError, RecursionError):
        raise JournalError(
            f"{meta} is not readable as what this program keeps about a job. Move it away and use "
            "--overwrite to start again, or give another output."
        ) from None
    return found


def _check(meta: Mapping[str, Any]) -> None:
    """Raise ValueError if this program has not written it."""
    if "format" not in meta:
        raise ValueError("another program's")
    for name in FREE | {SHARD}:
        text = meta.get(name, "")
        if not isinstance(text, str) or b"\0" in os.fsencode(text):
            raise ValueError(f"no {name}")
    if SHARD in meta:
        Shard.parse(meta[SHARD])


def differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How the job that wrote some results differs from the one that is wanted."""
    if FORMER in wanted and not isinstance(before.get(MODEL), dict):
        wanted = {**wanted, MODEL: wanted[FORMER]}
    old, new = _flat(before), _flat(wanted)
    return [
        _difference(name, old.get(name, "absent"), new.get(name, "absent"))
        for name in sorted((old.keys() | new.keys()) - FREE)
        if old.get(name) != new.get(name)
    ]


def _difference(name: str, old: str, new: str) -> str:
    if name in _DIFFER:
        return f"{_DIFFER[name]} is another"
    return f"{_CALLED.get(name, name)} was {old}, now {new}"


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields → {dotted name: JSON text}."""
    flat: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, ensure_ascii=False)
    return flat
