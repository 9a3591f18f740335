"""A tokenizer of bytes, a service around it, and an engine that answers at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.service import Limits, SamplingDefaults, Service
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.results.claim import Claim
from hpc_distkv.batch.results.journal import Journal
from hpc_distkv.batch.results.opening import Opening, Reuse, check_place
from hpc_distkv.control.messages.requests import (
    Request,
    Result,
    pack_tokens,
    record_dtype,
    unpack_tokens,
)
from hpc_distkv.model.detokenizer import Detokenizer, SpellingDetokenizer

VOCABULARY = 300
EOS = 299


class ByteTokenizer:
    """One token a byte; 256 is BOS, 257 and up are roles and specials."""

    def encode(
        self, text: str, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]:
        return [256] * add_special_tokens + list(text.encode())

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        return SpellingDetokenizer(
            lambda id: b"" if id > 255 and skip_special_tokens else self.token_bytes(id)
        )

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else f"<{id}>".encode()

    def chat(self, messages: list[dict[str, Any]], most: int | None = None) -> list[int]:
        tokens = [256]
        for message in messages:
            if message["role"] == "alien":
                raise TypeError("no such role")
            tokens += [257, *message["content"].encode()]
        return [*tokens, 258]


def make_service(max_model_len: int = 100, capacity: int | None = None, **defaults: Any) -> Service:
    tokenizer = ByteTokenizer()
    return Service(
        tokenizer=tokenizer,
        chat=tokenizer.chat,
        vocab_size=VOCABULARY,
        model_names=("tiny", "/models/tiny"),
        limits=Limits(max_model_len, capacity),
        defaults=SamplingDefaults(**defaults),
        eos_ids=(EOS,),
    )


def completion(custom_id: Any, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: Any, content: Any = "hi", **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Rows as JSON, bytes as they are; one a line."""
    with path.open("wb") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def answer(request: Request) -> Result:
    """The prompt backwards, as likely as not."""
    tokens = unpack_tokens(request.prompt)[::-1][: request.sampling.max_tokens]
    logprobs = b""
    if (top := request.sampling.logprobs) is not None:
        records = np.zeros(len(tokens), record_dtype(top))
        records["own"] = np.log(0.5)
        logprobs = records.tobytes()
    return Result(request.id, pack_tokens(tokens), "stop", 0.1, 0.2, logprobs)


def open_journal(
    path: Path,
    fingerprint: Mapping[str, Any],
    *,
    source: Path | None = None,
    errors: Path | None = None,
    **reuse: Any,
) -> Journal:
    """The results file at `path`, started or resumed; `reuse`: fields of `Reuse`."""
    check_place(path, source)
    claim = Claim.take(path)
    try:
        return Opening.look(claim, fingerprint, Reuse(**reuse), source, errors).begin()
    except JournalError:
        claim.release()
        raise


def run_job(
    source: Path, output: Path, service: Service | None = None, overwrite: bool = False
) -> Job:
    service = service or make_service()
    fingerprint = job_fingerprint("f00d", service.model_names[0], service.defaults)
    intake = Intake(source)
    journal = open_journal(output, fingerprint, overwrite=overwrite, source=source)
    job = Job(intake, journal, service)
    for request in job.requests():
        job.finish(answer(request))
        if job.write():
            job.sync()
    job.close()
    return job


MIXED: list[Any] = [
    completion("a", "one"),
    completion("a", "the same id again"),
    b"",
    chat("b", "two"),
    b"not json",
    completion(None, "no id"),
    completion("c", "three", temperature=9),
    completion("a", "and again"),
    b"   ",
    completion("c", "error rows hold their id too"),
    chat("d", "x" * 200),
    completion("e", "last", max_tokens=2),
]
MIXED_ROWS = 10


def summary(row: dict[str, Any]) -> tuple[Any, ...]:
    """A result row without its timestamp."""
    body = row["response"]["body"]
    return (
        row["id"],
        row["custom_id"],
        row["response"]["status_code"],
        json.dumps(body.get("choices", body.get("error"))),
    )


def summaries(path: Path) -> Counter[tuple[Any, ...]]:
    return Counter(summary(row) for row in read_lines(path))
