"""The job that a results file belongs to: `<output>.meta.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.replace import replace_file
from hpc_distkv.batch.side_files import meta_path

FORMAT = 1
"""Version of the results file and of what resuming relies on."""

INPUT = "input"
"""Where the meta file says which file the rows came from."""
ERRORS = "errors"
"""Where it says which file the error rows are in, if they are in another one."""
DROPPED = "dropped_by"
"""Where it says which Slurm job was the last to drop what the file held, or its error rows."""
FREE = {INPUT, ERRORS, DROPPED}
"""What a rerun may change."""

_RESTART = "Use --overwrite to start again, or another output."


def describe(
    fingerprint: Mapping[str, Any],
    source: str | os.PathLike[str] | None,
    errors: Path | None,
    job: str | None,
) -> dict[str, Any]:
    """What there is to know of a job: see `Opening.look`. `job`: Slurm's id of one that drops
    something."""
    meta: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
    if source is not None:
        meta[INPUT] = str(Path(source).resolve())
    if errors is not None:
        meta[ERRORS] = str(errors.resolve())
    if job:
        meta[DROPPED] = job
    return meta


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Replace what is known of the job of the results file at `path`. Raises OSError."""
    # Not by msgspec, which takes no path that is not UTF-8.
    replace_file(meta_path(path), [json.dumps(meta, indent=2).encode(), b"\n"])


def check_meta(path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse the results of another job, with JournalError. Raises OSError."""
    meta = meta_path(path)
    if not meta.exists():
        raise JournalError(
            f"{path} is not empty and has no {meta.name} beside it, so it is not known which job "
            f"wrote it. {_RESTART}"
        )
    if found := differences(path, wanted):
        raise JournalError(f"{path} holds results of another job: {'; '.join(found)}. {_RESTART}")


def note_meta(path: Path, wanted: Mapping[str, Any]) -> None:
    """Note what may change of a job that is resumed. Raises OSError."""
    before, after = read_meta(path), dict(wanted)
    if DROPPED in before:
        after.setdefault(DROPPED, before[DROPPED])
    if after != before:
        write_meta(path, after)


def has_meta(path: Path) -> bool:
    """Whether anything is known of the job."""
    return meta_path(path).exists()


def check_errors(path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to go on without the file of error rows, which would be answered again. Raises
    JournalError and OSError."""
    before = read_meta(path).get(ERRORS) if has_meta(path) else None
    if before and before != wanted.get(ERRORS) and Path(before).exists():
        raise JournalError(
            f"the error rows of {path} are in {before}: give --error-file {before}, or remove that "
            "file to answer them again."
        )


def read_meta(path: Path) -> dict[str, Any]:
    """What is known of the job that wrote the results file at `path`. Raises JournalError, and
    OSError if there is nothing."""
    meta = meta_path(path)
    try:
        found: dict[str, Any] = msgspec.convert(json.loads(meta.read_bytes()), dict[str, Any])
        if "format" not in found:
            raise ValueError("another program's")
    except (ValueError, RecursionError):
        raise JournalError(
            f"{meta} is not readable as what this program keeps about a job. Move it away and use "
            "--overwrite to start again, or give another output."
        ) from None
    return found


def differences(path: Path, wanted: Mapping[str, Any]) -> list[str]:
    """How the job that wrote the results differs from the one that is wanted."""
    old, new = _flat(read_meta(path)), _flat(wanted)
    return [
        f"{name} was {old.get(name, 'absent')}, now {new.get(name, 'absent')}"
        for name in sorted((old.keys() | new.keys()) - FREE)
        if old.get(name) != new.get(name)
    ]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields → {dotted name: JSON text}."""
    flat: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, ensure_ascii=False)
    return flat
