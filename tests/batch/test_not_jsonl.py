"""Files of other kinds are refused whole, and bad rows stay rows."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import pytest
from batch_fakes import completion, run_job

from hpc_distkv.batch.errors import InputError
from hpc_distkv.batch.input.intake import Intake

ROWS = [completion(f"{i}", "x" * 30) for i in range(4)]
LINES = [json.dumps(row) for row in ROWS]
TEXT = "\n".join(LINES) + "\n"
LISTED = ",\n".join(LINES)


def zipped(text: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", text)
    return file.getvalue()


def table(separator: str, prompts: list[str]) -> bytes:
    file = io.StringIO()
    rows = [("custom_id", "body", "prompt")]
    rows += [(str(i), json.dumps({"a": 1, "b": [i] * i}), x) for i, x in enumerate(prompts)]
    csv.writer(file, delimiter=separator).writerows(rows)
    return file.getvalue().encode()


OTHERS: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(TEXT.encode()), "gunzip"),
    "xz": (lzma.compress(TEXT.encode()), "unxz"),
    "bzip2": (bz2.compress(TEXT.encode()), "bunzip2"),
    "zip": (zipped(TEXT), "unzip"),
    "compress": (b"\x1f\x9d\x90" + bytes(50), "uncompress"),
    "lzip": (b"LZIP\x01\x0c" + bytes(50), "lzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "unzstd"),
    "parquet": (b"PAR1" + bytes(50), "Parquet"),
    "utf-16": (TEXT.encode("utf-16"), "iconv"),
    "utf-16 without a mark": (TEXT.encode("utf-16-le"), "iconv"),
    "array": (json.dumps(ROWS).encode(), "array"),
    "array with a mark": (b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), "array"),
    "array of one": (f"[\n{LINES[0]}\n]\n".encode(), "array"),
    "array, an object a line": (f"[\n{LISTED}\n]\n".encode(), "array"),
    "array, without a line for its bracket": (f"[{LISTED}]".encode(), "array"),
    "pretty array": (json.dumps(ROWS, indent=2).encode(), "array"),
    "long array": (json.dumps([completion("a", "x" * (2 << 20))]).encode(), "array"),
    "array, a comma before each object": (
        f"[\n{LISTED}\n]\n".replace(",\n", "\n,").encode(),
        "array",
    ),
    "array, its bracket and commas before": (
        f"[{LISTED}\n]\n".replace(",\n", "\n,").encode(),
        "array",
    ),
    "array, cut before an object": (f"[\n{LINES[0]},\n{LINES[1]},\n".encode(), "array"),
    "array, cut within an object": (f"[\n{LISTED[:-9]}".encode(), "array"),
    "array, cut before its end": (f"[{LISTED}\n".encode(), "array"),
    "array without a line for its bracket, cut": (f"[{LISTED[:-9]}".encode(), "array"),
    "pretty array, cut": (json.dumps(ROWS, indent=2)[:-50].encode(), "array"),
    "array with commas before, cut": (
        f"[\n{LISTED}".replace(",\n", "\n,")[:-9].encode(),
        "array",
    ),
    "long cut array": (("[\n" + ",\n".join(LINES * 9000)).encode(), "array"),
    "pretty objects": ("\n".join(json.dumps(r, indent=1) for r in ROWS).encode(), "several lines"),
    "commas": (",\n".join([*LINES, ""]).encode(), "comma"),
    "carriage returns": (TEXT.replace("\n", "\r").encode(), "carriage"),
    "csv": (b"custom_id,prompt\n1,Hello\n2,Hi\n", "CSV"),
    "tsv": (b"custom_id\tprompt\r\n1\tHello\r\n", "CSV"),
    "csv with objects": (table(",", ["Hello {name}", "a, b; c", 'say "hi"']), "CSV"),
    "tsv with objects": (table("\t", ["Hello {name}"] * 3), "CSV"),
    "long csv with a cut row": (table(",", ["Dear {name},\nthis is\nfor you"] * 40), "CSV"),
    "text with braces": (b"Tell {name} a story.\n" * 20, "no JSON"),
    "text": (b"Tell me a story.\n" * 20, "no JSON"),
}


@pytest.mark.parametrize(("content", "said"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_kind_is_one_message(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(InputError, match=f"cannot read .*{said}"):
        Intake(tmp_path / "in")


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "[1, 2]",
        "[",
        json.dumps(ROWS),
        json.dumps(ROWS)[:50],
        "{",
        LINES[0] + ",",
        "[" + LINES[0] + ",",
        "," + LINES[0],
        "{" + "\r" + LINES[0],
        '"a","b"',
        "]",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_row_stays_a_row(bad: str, first: bool, tmp_path: Path) -> None:
    lines = [bad, *LINES[1:]] if first else [*LINES[1:], bad]
    (tmp_path / "in").write_text("\n".join([*lines, ""]), newline="\n")
    job = run_job(tmp_path / "in", tmp_path / "out")
    assert (job.answered, job.failed) == (3, 1)


@pytest.mark.parametrize(
    "few", ["nonsense\n", "[1]\n", "null\nnull\n", "\n \n", "[1]\n[2]\n", "a{x}\nb{y}\n"]
)
def test_a_few_bad_rows_are_rows(few: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text(few)
    job = run_job(tmp_path / "in", tmp_path / "out")
    assert job.failed == len(few.split())
