"""The model that results come from, and what a rerun with another one is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import open_journal

from hpc_distkv.batch.answers.line import error_line
from hpc_distkv.batch.errors import JournalError, RowError
from hpc_distkv.batch.input.service import SamplingDefaults
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.job import job_fingerprint

MODEL: dict[str, Any] = {
    "config": {"family": "Llama", "rope": {"theta": 1e4}},
    "tokenizer": "a1",
    "special_tokens": "b1",
    "chat_template": None,
    "eos_token_ids": [2],
    "dtype": "bfloat16",
    "weights": "c1",
}
FORMER = "0123456789abcdef"


def job(model: Any = MODEL, name: str = "tiny", shard: Shard | None = None) -> dict[str, Any]:
    return job_fingerprint(model, name, SamplingDefaults(), shard, FORMER)


def started(path: Path, fingerprint: Mapping[str, Any]) -> Path:
    journal = open_journal(path, fingerprint)
    journal.append(error_line(0, "a", RowError("bad")))
    journal.close()
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "c2"}, "the content of the weights is another"),
        ({"tokenizer": "a2"}, "tokenizer.json is another"),
        ({"special_tokens": "b2"}, "what is beside tokenizer.json about special tokens is another"),
        ({"chat_template": "d"}, "the chat template is another"),
        ({"dtype": "float32"}, '--dtype was "bfloat16", now "float32"'),
        ({"eos_token_ids": [2, 3]}, "eos_token_id was [2], now [2, 3]"),
        (
            {"config": {"family": "Llama", "rope": {"theta": 5e5}}},
            "model.config.rope.theta was 10000.0, now 500000.0",
        ),
    ],
)
def test_a_rerun_with_another_model_hears_what_differs(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = started(tmp_path / "out", job())
    with pytest.raises(JournalError) as refused:
        open_journal(path, job(MODEL | changes))
    assert f"holds results of another job: {said}. Use --overwrite" in str(refused.value)


def test_a_model_that_was_renamed_is_the_same(tmp_path: Path) -> None:
    path = started(tmp_path / "out", job())
    journal = open_journal(path, job(name="renamed"))
    assert journal.answered.custom_ids == {"a"}
    journal.close()
    assert json.loads((tmp_path / "out.meta.json").read_bytes())["served_model"] == "renamed"


def test_results_of_the_version_before_are_resumed_and_know_more_then(tmp_path: Path) -> None:
    """It knew a model by one hash, of config.json and of the sizes of weight files."""
    shard = Shard(1, 2)
    path = started(tmp_path / "out", job_fingerprint(FORMER, "tiny", SamplingDefaults(), shard))
    journal = open_journal(path, job(shard=shard))
    assert journal.answered.custom_ids == {"a"}
    journal.close()
    with pytest.raises(JournalError, match="the content of the weights is another"):
        open_journal(path, job(MODEL | {"weights": "c2"}, shard=shard))
    with pytest.raises(JournalError, match='shard was "1/2", now absent'):
        open_journal(path, job())


def test_results_of_the_version_before_with_another_model_are_refused(tmp_path: Path) -> None:
    path = started(tmp_path / "out", job_fingerprint("beef", "tiny", SamplingDefaults()))
    with pytest.raises(JournalError, match=r'job: model was "beef", now "\w{16}"\. Use'):
        open_journal(path, job())
