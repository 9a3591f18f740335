"""One batch job as the engine of rank 0 sees it: a source of requests and a sink of results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.intake import Intake
from hpc_distkv.batch.journal import Journal
from hpc_distkv.batch.response import answer_line, error_line
from hpc_distkv.batch.rows import Row, parse_row
from hpc_distkv.batch.schema import Endpoint
from hpc_distkv.batch.service import SamplingDefaults, Service
from hpc_distkv.control.messages import Request, Result, unpack_tokens

COMMIT_INTERVAL = 1.0
"""Seconds between two fsyncs of the results."""


@dataclass(frozen=True, slots=True)
class _Pending:
    custom_id: str
    endpoint: Endpoint
    prompt_tokens: int


def job_fingerprint(
    model_fingerprint: str, served_model: str, defaults: SamplingDefaults
) -> dict[str, Any]:
    """What must not change between a run and its rerun, for `Journal.open`."""
    return {
        "model": model_fingerprint,
        "served_model": served_model,
        "defaults": msgspec.to_builtins(defaults),
    }


class Job:
    """Every row of `intake` gets exactly one line in `journal`, whatever is wrong with it.

    Remembers the rows in flight only. Owns neither file's opening, but closes both.
    """

    def __init__(self, intake: Intake, journal: Journal, service: Service) -> None:
        self._intake = intake
        self._journal = journal
        self._service = service
        self._pending: dict[int, _Pending] = {}
        self._committed_at = time.monotonic()
        self.answered = 0
        """Rows answered in this run."""
        self.failed = 0
        """Rows that became error rows in this run."""

    def requests(self) -> Iterator[Request]:
        """The rows still to be answered, oldest first; read and tokenized as they are pulled.

        Call once. Writes the error rows on its way, thousands of them perhaps, before it yields.
        Raises InputError and JournalError.
        """
        for envelope in self._intake.envelopes(self._journal.answered):
            try:
                row = parse_row(envelope, self._service)
            except RowError as error:
                self._write_error(envelope.number, envelope.custom_id, error)
                self.commit()
            else:
                yield self._start(row)

    def finish(self, result: Result) -> None:
        """Write the answer of a request that came from `requests`. Raises JournalError."""
        row = self._pending.pop(result.id)
        tokens = unpack_tokens(result.tokens)
        self._journal.append(
            answer_line(
                number=result.id,
                custom_id=row.custom_id,
                endpoint=row.endpoint,
                model=self._service.model_names[0],
                text=self._service.tokenizer.decode(tokens),
                finish_reason=result.finish_reason,
                prompt_tokens=row.prompt_tokens,
                completion_tokens=len(tokens),
                created=int(time.time()),
            )
        )
        self.answered += 1

    def refuse(self, request_id: int, error: RowError) -> None:
        """Write an error row for a request that the engine cannot answer. Raises JournalError."""
        row = self._pending.pop(request_id)
        self._write_error(request_id, row.custom_id, error)

    def commit(self, now: bool = False) -> None:
        """Make the lines so far durable, at most once a second unless `now`. Raises JournalError.

        Cheap enough to be called in every step.
        """
        if now or time.monotonic() - self._committed_at >= COMMIT_INTERVAL:
            self._journal.commit()
            self._committed_at = time.monotonic()

    def close(self) -> None:
        """Commit and close. Rows in flight are left for a rerun. Raises JournalError."""
        self._intake.close()
        self._journal.close()

    @property
    def in_flight(self) -> int:
        """Requests handed out and not finished."""
        return len(self._pending)

    @property
    def skipped(self) -> int:
        """Rows passed over so far, because an earlier run had answered them."""
        return self._intake.skipped

    @property
    def failed_before(self) -> int:
        """Error rows that the results file held at the start of this run."""
        return self._journal.answered.failed

    @property
    def total_rows(self) -> int | None:
        """Rows of the input; None until the last one has been read."""
        return self._intake.rows if self._intake.exhausted else None

    @property
    def bytes_read(self) -> int:
        """Bytes of the input read so far, for progress."""
        return self._intake.bytes_read

    @property
    def input_bytes(self) -> int:
        """Size of the input in bytes."""
        return self._intake.size

    @property
    def complete(self) -> bool:
        """Whether every row of the input has its line."""
        return self._intake.exhausted and not self._pending

    def _start(self, row: Row) -> Request:
        self._pending[row.number] = _Pending(row.custom_id, row.endpoint, len(row.prompt))
        return row.request()

    def _write_error(self, number: int, custom_id: str | None, error: RowError) -> None:
        self._journal.append(error_line(number, custom_id, error))
        self.failed += 1
