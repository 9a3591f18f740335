"""A job asks Slurm for the memory that its ranks need, and says what takes it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from job_script import sbatch

CPU = ("--kind", "cpu", "--mpi", "pmi2", "--ntasks-per-node", "3", "--kv-memory", "2GiB")


def asked(monkeypatch: pytest.MonkeyPatch, model: Path, *words: str) -> str | None:
    """The value of --mem in the script."""
    text = sbatch(monkeypatch, *CPU, "--model", str(model), *words).stdout
    found = re.search("^#SBATCH --mem=(.*)$", text, re.MULTILINE)
    return found and found[1]


def test_a_node_has_memory_for_the_caches_of_its_ranks_and_what_they_are_beside(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = int((asked(monkeypatch, tiny_model) or "").removesuffix("M"))
    assert 3 * (2048 + 300) < mib < 3 * 2 * 2048
    more = int((asked(monkeypatch, tiny_model, "--host-kv-memory", "1GiB") or "").removesuffix("M"))
    assert 3 * 1024 <= more - mib < 3 * 1.3 * 1024


def test_each_row_of_the_input_takes_memory_for_its_id(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").write_text("{}\n")
    (tmp_path / "many").write_text("{}\n" * 4_000_000)
    sizes = [
        int((asked(monkeypatch, tiny_model, "-i", str(tmp_path / name)) or "").removesuffix("M"))
        for name in ("one", "many")
    ]
    assert sizes[1] - sizes[0] > 3 * 4_000_000 * 100 / 2**20


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("--mem", "7G"), "7G"),
        (("--mem-per-cpu", "7G"), None),
        (("--sbatch-line", "--mem=9G"), "9G"),
        (("--exclusive",), "0"),
    ],
)
def test_what_is_given_stands_and_a_node_for_itself_is_taken_whole(
    words: tuple[str, ...], value: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(monkeypatch, tiny_model, *words) == value


def test_the_script_says_what_takes_the_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sbatch(monkeypatch, *CPU, "--model", str(tiny_model)).stdout
    assert "\n# Of its memory each of the 3 ranks on a node needs weights " in text


def test_of_a_model_that_cannot_be_seen_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, Path("/no/where")) is None


def test_an_input_that_is_a_pipe_is_not_waited_for(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert asked(monkeypatch, tiny_model, "-i", str(tmp_path / "pipe"))
