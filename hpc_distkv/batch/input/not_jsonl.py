"""Input files that are no JSON Lines at all: one message, where every line would be an error row.

A file with bad rows among good ones, or of a few bad rows, is none of these.
"""

from __future__ import annotations

import csv
import json
import os
from itertools import islice

BOM = b"\xef\xbb\xbf"
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\x1f\x9d": "uncompress",
    b"LZIP\x01": "lzip -d",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ\x00": "unxz",
    b"BZh91AY&SY": "bunzip2",
    b"PK\x03\x04": "unzip",
    b"7z\xbc\xaf\x27\x1c": "7z x",
    b"\x04\x22\x4d\x18": "unlz4",
}
"""First bytes → what unpacks it."""
_BINARY = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"SQLite format 3\x00": "SQLite",
    b"%PDF-": "PDF",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"{\x00", b"\x00{", b"[\x00", b"\x00[")
_GOES_ON = (b"{", b",", b"[")
"""How a line of an object over several lines ends."""
_LOOK = 1 << 20
"""Bytes of the file that are looked at, from its start."""
_LINES = 20
"""First lines that are looked at. Fewer that are no JSON are taken for rows."""
_NEEDED = 'the input must be JSON Lines, one object like {"custom_id": …} a line'


def problem_of(fd: int) -> str | None:
    """What is wrong with an open file that is no JSON Lines, and what to do with it; None for one
    that may be. Raises OSError."""
    head = os.pread(fd, _LOOK, 0)
    return _of_bytes(head) or _of_lines(head, fd)


def _of_bytes(head: bytes) -> str | None:
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed: unpack it ({command})"
    for magic, kind in _BINARY.items():
        if head.startswith(magic):
            return f"is a {kind} file: {_NEEDED}"
    if head.startswith(_UTF16):
        return "is not in UTF-8: convert it (iconv -f UTF-16 -t UTF-8)"
    return None


def _of_lines(head: bytes, fd: int) -> str | None:
    lines = _lines(head.removeprefix(BOM), whole=len(head) < _LOOK)
    first, second = lines[0], lines[1] if len(lines) > 1 else b""
    if _is_array(lines, ended=_end(fd) == b"]"):
        return f"is a JSON array: {_NEEDED} (jq -c '.[]' FILE > NEW)"
    if first.startswith(b"{") and first.endswith(_GOES_ON) and second.startswith((b'"', b"}")):
        return f"has objects over several lines: {_NEEDED} (jq -c . FILE > NEW)"
    if all(line.endswith(b"},") and _is_json(line[:-1]) for line in (first, second)):
        return "has a comma behind each object: remove it (sed 's/,$//' FILE > NEW)"
    if not second and b"}\r{" in first:
        return "has lines that end with a carriage return: convert it (tr '\\r' '\\n')"
    if any(line.startswith(b"{") for line in lines):
        return None
    if _is_table(lines):
        return f"is a table (CSV): {_NEEDED}"
    return f"has no JSON in its first lines: {_NEEDED}" if len(lines) == _LINES else None


def _is_table(lines: list[bytes]) -> bool:
    """Whether all rows have as many columns as the first one, and more than one."""
    text = [line.decode("utf-8", "replace") for line in lines]
    return len(lines) > 1 and any(_columns(text, separator) > 1 for separator in ",\t;")


def _columns(lines: list[str], separator: str) -> int:
    """How many columns all rows have; 0 if they differ. A row may go on over several lines, and the
    last of many is left out, as it may be cut off."""
    try:
        rows = list(csv.reader(lines, delimiter=separator))
    except csv.Error:
        return 0
    counts = {len(row) for row in (rows[:-1] if len(lines) == _LINES else rows)}
    return counts.pop() if len(counts) == 1 else 0


def _lines(head: bytes, whole: bool) -> list[bytes]:
    """The first lines that are not blank, without what is around them; at least one."""
    lines = head.split(b"\n")
    if not whole and len(lines) > 1:
        lines.pop()
    stripped = (line.strip() for line in lines)
    return list(islice((line for line in stripped if line), _LINES)) or [b""]


def _is_array(lines: list[bytes], ended: bool) -> bool:
    """Whether the elements of one array seem to follow each other, also if its end is missing:
    beside objects that are whole lines, a line that begins as an array is a bad row."""
    begin = b" ".join(line[:100] for line in lines[:2])
    if not begin.startswith(b"[") or not begin[1:].lstrip().startswith((b"{", b"]")):
        return False
    behind_first = lines[2:] if lines[0] == b"[" else lines[1:]
    if behind_first and all(line.startswith((b",", b"]")) for line in behind_first):
        return True
    if ended:
        whole = len(lines) == 1 or lines[2:] == [b"]"]
        return whole or not (_is_json(lines[0]) or _is_json(lines[1]))
    goes_on = len(lines) > 1 and lines[0].endswith(_GOES_ON)
    return goes_on and not _has_row(lines)


def _has_row(lines: list[bytes]) -> bool:
    """Whether a line is an object; the last of several may also be the end of an array."""
    looked = lines[:-1] if len(lines) > 2 else lines
    return any(line.startswith(b"{") and _is_json(line) for line in looked)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _end(fd: int) -> bytes:
    """The last byte that is not blank."""
    size = os.fstat(fd).st_size
    return os.pread(fd, 4096, max(0, size - 4096)).rstrip()[-1:]
