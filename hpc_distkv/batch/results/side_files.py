"""The names of the files beside a results file."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.regular import TEMPORARY, TEMPORARY_LENGTH, same_file

_META, _CLAIM, _UNFINISHED = ".meta.json", ".claim", ".unfinished.jsonl"
_STARTS = re.compile(r"(.+)\.[0-9]+\.starts", re.DOTALL)
"""In which a job script counts starts: results.jsonl.418.starts, of Slurm's job 418."""
_LONGEST_SUFFIX = len(_UNFINISHED) + TEMPORARY_LENGTH
_ABANDONED = 60.0
"""Seconds after which nobody is about to put a claim in the place of a void one."""


def meta_path(output: Path) -> Path:
    """The record of the job of a results file."""
    return _beside(output, _META)


def claim_path(output: Path) -> Path:
    """The claim of a results file."""
    return _beside(output, _CLAIM)


def unfinished_path(output: Path) -> Path:
    """The unfinished answers of an earlier run."""
    return _beside(output, _UNFINISHED)


def side_files(output: Path) -> tuple[Path, Path, Path]:
    """The files beside a results file, during a run or after it, without temporary ones."""
    return meta_path(output), claim_path(output), unfinished_path(output)


def is_side_file(path: Path, output: Path) -> bool:
    """Whether `path` is one of the side files of `output`, by whatever name or link, or could be
    one of its temporary files or a job script's count of starts."""
    real = Path(os.path.realpath(output))
    given = Path(os.path.realpath(path))
    lasting = side_files(real)
    if any(same_file(given, side) for side in lasting):
        return True
    if (counts := _STARTS.fullmatch(given.name)) and given.with_name(counts[1]) == real:
        return True
    whose = TEMPORARY.fullmatch(given.name)
    return whose is not None and given.with_name(whose[1]) in (real, *lasting)


def has_side_name(path: Path) -> bool:
    """Whether a name is like those of side files, whatever they lie beside."""
    name = path.name
    passing = TEMPORARY.fullmatch(name) or _STARTS.fullmatch(name)
    return name.endswith((_META, _CLAIM, _UNFINISHED)) or passing is not None


def excess_of_name(output: Path) -> int:
    """Bytes by which a results file's name is too long for what is to lie beside it."""
    most = 255
    with contextlib.suppress(OSError):
        most = os.pathconf(output.parent, "PC_NAME_MAX")
    return max(0, len(os.fsencode(output.name)) + _LONGEST_SUFFIX - most)


def remove_leftovers(output: Path) -> None:
    """Remove the temporary files that killed runs have left beside a results file. Only the holder
    of its claim may call it; others then make no temporary files but those of a claim."""
    meta, claim, unfinished = side_files(output)
    with contextlib.suppress(OSError):
        now = claim.stat().st_mtime
        for entry in os.scandir(output.parent):
            whose = TEMPORARY.fullmatch(entry.name)
            if not whose or whose[1] not in (output.name, meta.name, claim.name, unfinished.name):
                continue
            state = entry.stat(follow_symlinks=False)
            ours = stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid()
            if ours and (whose[1] != claim.name or now - state.st_mtime > _ABANDONED):
                os.unlink(entry.path)


def _beside(path: Path, suffix: str) -> Path:
    if path.name in ("", ".."):
        raise JournalError(f"'{path}' is a directory: name a file.")
    return path.with_name(path.name + suffix)
