"""Files that every run of a job writes anew, such as its metrics: earlier ones are kept."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

from hpc_distkv.regular import open_regular, real_path, sync_folder

SUFFIXES = (".json.gz", ".json")
UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error)
"""What reading a file raises that is damaged or of another kind."""
log = logging.getLogger(__name__)


def write_anew(
    path: Path, about: Mapping[str, Any], what: str, write: Callable[[Path], None]
) -> None:
    """Have a finished run `write` to `path`, and keep what earlier runs of its job wrote there.
    `what` it is, for people. A failure is told in the log alone: the answers are there."""
    try:
        keep_earlier(path, about)
        write(path)
    except Exception as error:
        bug = not isinstance(error, OSError)
        log.error("cannot write the %s %s: %s", what, path, error, exc_info=bug)


def keep_earlier(path: Path, about: Mapping[str, Any]) -> None:
    """Make way for what a run writes to `path`. `about`: what the run is.

    What an earlier run of the same job wrote there gets the next number, as metrics.1.json: so the
    plain name is that of the last run, and the numbers are in the order of time. A run that starts
    the job anew takes the place of all of them. What another job wrote is replaced. Raises OSError.
    """
    path = real_path(path)
    if read_about(path).get("output") != about["output"]:
        return
    if about["resumed"]:
        number = next(n for n in count(1) if not numbered(path, n).exists())
        path.rename(numbered(path, number))
        sync_folder(path.parent)
        return
    for old in _earlier(path):
        if read_about(old).get("output") == about["output"]:
            old.unlink()


def numbered(path: Path, number: int) -> Path:
    """metrics.json → metrics.1.json."""
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), path.suffix)
    return path.with_name(f"{path.name.removesuffix(suffix)}.{number}{suffix}")


def read_about(path: Path) -> dict[str, Any]:
    """What the run was that wrote a metrics file or a trace; nothing if that cannot be read."""
    try:
        content = read_figures(path)
    except UNREADABLE:
        return {}
    about = content.get("otherData", content.get("job"))
    return about if isinstance(about, dict) else {}


def read_figures(path: Path) -> dict[str, Any]:
    """What a metrics file holds; of a trace what its first line says, since the rest may be large.
    Raises UNREADABLE."""
    with opened(path) as file:
        first = file.readline()
        if first.startswith('{"displayTimeUnit"'):
            content = json.loads(first.rstrip().removesuffix(",") + "}")
        else:
            content = json.loads(first + file.read())
    return content if isinstance(content, dict) else {}


def opened(path: Path) -> IO[str]:
    """A file that may be compressed. Raises OSError."""
    file = open_regular(path)
    return cast(IO[str], gzip.open(file, "rt") if path.suffix == ".gz" else TextIOWrapper(file))


def _earlier(path: Path) -> Iterator[Path]:
    for number in count(1):
        old = numbered(path, number)
        if not old.exists():
            return
        yield old
