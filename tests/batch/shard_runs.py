"""Runs over an input, whole or in shards, that answer at once."""

from __future__ import annotations

import random
from pathlib import Path

from batch_fakes import answer, make_service, open_journal

from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.results.journal import Journal


def run_part(
    source: Path,
    output: Path,
    shard: Shard | None = None,
    *,
    errors: Path | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Job:
    """Answer the rows of `source`, in any order; `most`: answers after which it is stopped."""
    service = make_service(seed=seed)
    fingerprint = job_fingerprint("f00d", "tiny", service.defaults, shard)

    def journal(path: Path, errors: Path | None = None) -> Journal:
        return open_journal(path, fingerprint, source=source, errors=errors)

    journals = journal(output, errors), journal(errors) if errors else None
    job = Job(Intake(source, shard), journals[0], service, journals[1])
    requests = list(job.requests())
    random.Random(1).shuffle(requests)
    for request in requests[:most]:
        job.finish(answer(request))
    job.close()
    return job


def run_shards(source: Path, count: int, *, apart: bool = False) -> list[Path]:
    """Answer all shards; `apart`: with files of error rows. The results files, `out.1` to
    `out.count`."""
    outputs = []
    for index in range(1, count + 1):
        output = source.with_name(f"out.{index}")
        errors = source.with_name(f"errors.{index}") if apart else None
        run_part(source, output, Shard(index, count), errors=errors)
        outputs.append(output)
    return outputs
