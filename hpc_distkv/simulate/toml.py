"""Descriptions in TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hpc_distkv.errors import OptionError
from hpc_distkv.regular import read_regular

T = TypeVar("T")


def read_toml(
    path: str | Path,
    kind: type[T],
    what: str,
    reason: Callable[[dict[str, Any], msgspec.ValidationError], str] = lambda _, error: str(error),
) -> T:
    """The file's content as `kind`. Raises OptionError that says `what` it should be, and names the
    file and the key at fault; `reason` words the latter."""
    try:
        content = tomllib.loads(read_regular(Path(path)).decode())
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not TOML: {error}") from error
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise OptionError(f"{path} is no {what}: {reason(content, error)}") from error
