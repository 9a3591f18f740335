"""One batch job as the engine of rank 0 sees it: a source of requests and a sink of results."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from hpc_distkv.batch.answers.choice import fault_of, read_choice
from hpc_distkv.batch.answers.line import answer_line, error_line
from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.in_flight import InFlight, Pending
from hpc_distkv.batch.input.envelope import Envelope
from hpc_distkv.batch.input.intake import MOST_NAMED, Intake, remarks
from hpc_distkv.batch.input.rows import parse_row, which_choice
from hpc_distkv.batch.input.service import SamplingDefaults, Service
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.journal import Journal
from hpc_distkv.batch.results.meta import FORMER, MODEL, SERVED, SHARD
from hpc_distkv.batch.results.order import InputOrder
from hpc_distkv.control.messages.requests import Request, Result, Unfinished

log = logging.getLogger(__name__)

COMMIT_INTERVAL = 1.0
"""Seconds between two times that results are written."""


class Refused(NamedTuple):
    """A row that cannot be answered."""

    number: int
    custom_id: str | None
    request_digest: str
    error: RowError
    revision: int
    """Of its line."""


class AllRead(NamedTuple):
    """Behind the last row of the input."""

    rows: int


Entry = Pending | Refused | AllRead
"""What reading came to: from the half of a `Job` that reads to the one that writes."""


class Written(NamedTuple):
    """A row whose line was written, and no error row."""

    results: Sequence[Result]
    """Its answers."""
    custom_id: str
    prompt_tokens: int


def job_fingerprint(
    model: Any,
    served_model: str,
    defaults: SamplingDefaults,
    shard: Shard | None = None,
    former: str | None = None,
) -> dict[str, Any]:
    """What must not change between a run and its rerun, for `Opening.look`: `model` as JSON values,
    and as versions wrote it that knew less of it (`former`). The name may change."""
    return {
        MODEL: model,
        **({FORMER: former} if former else {}),
        SERVED: served_model,
        "defaults": msgspec.to_builtins(defaults),
        **({SHARD: str(shard)} if shard else {}),
    }


class Job:
    """Every row of `intake` gets exactly one line in `journal`, whatever is wrong with it; or, if
    it is an error row, in the journal `errors` where there is one.

    Takes over what `journal` knows to be answered, and what earlier runs have begun. Owns no file's
    opening, but closes all.

    Has two halves, which may be in threads of their own (`batch.threads`). `entries` reads: it owns
    the intake and what is answered. `enter`, `finish`, `save`, `refuse` and `write` write: they own
    the journals, the rows in flight and all counts but the intake's own, which only grow. `sync`
    may be in a third thread. `requests` reads and writes. What is left is for the time before and
    after.

    Once a journal has failed, no line is added to any: rows stay in flight, and their answers are
    saved for the rerun.
    """

    def __init__(
        self, intake: Intake, journal: Journal, service: Service, errors: Journal | None = None
    ) -> None:
        self._intake = intake
        self._journal = journal
        self._errors = errors or journal
        self._service = service
        self._answered = journal.answered
        if errors:
            self._answered.include(errors.answered)
        done = self._answered.custom_ids
        self._begun = {a: b for a, b in journal.unfinished.items() if a.custom_id not in done}
        self._in_flight = InFlight(self._begun)
        self.resumed = bool(self._answered.lines or self._begun)
        """Whether earlier runs have done or begun anything."""
        self._written_at = time.monotonic()
        self.input = intake.path
        self.output = journal.path
        self.answered = 0
        """Rows answered in this run."""
        self.failed = 0
        """Rows that became error rows in this run."""
        self.total_rows: int | None = None
        """Rows of the input; None until the last one has been read."""

    def requests(self) -> Iterator[Request]:
        """The rows still to be answered, oldest first; read and tokenized as they are pulled.

        Call once. Writes the error rows on its way, and passes over answered ones, millions of them
        perhaps. Raises InputError and JournalError.
        """
        for entry, requests in self.entries():
            self.enter(entry)
            yield from requests

    def entries(self) -> Iterator[tuple[Entry, Sequence[Request]]]:
        """Each row still to be answered as it is read and tokenized, oldest first: what `enter` is
        told of it before anything else, and its requests that are left. Call once. Raises
        InputError."""
        for envelope in self._intake.envelopes(self._answered):
            yield self._read(envelope)
        if self._intake.exhausted:
            yield AllRead(self._intake.rows), ()

    def stop_reading(self) -> None:
        """`entries` ends within a line; may be called from another thread than that has."""
        self._intake.stop()

    def enter(self, entry: Entry) -> None:
        """A row was read. Writes its line if it has no request. Raises JournalError."""
        match entry:
            case Pending():
                self._in_flight.enter(entry)
                if entry.complete and not self._broken:
                    self._write_answer(entry)
            case Refused():
                if not self._broken:
                    self._write_error(*entry)
            case AllRead(rows):
                self.total_rows = rows

    def save(self, unfinished: Unfinished) -> None:
        """Keep what was made of a request that came from `requests` and will not be finished in
        this run."""
        number, choice = which_choice(unfinished.id)
        output, logprobs = unfinished.output, unfinished.logprobs
        self._in_flight.save(number, choice, output=output, logprobs=logprobs)

    def finish(self, result: Result) -> Written | None:
        """Take the result of a request that came from `requests`, and write the answer of its row
        if it is the last. Raises JournalError."""
        number, choice = which_choice(result.id)
        pending = self._in_flight.get(number)
        if pending is None:
            return None  # Another request of the row was refused, and the row with it.
        if fault := fault_of(result):
            self.refuse(result.id, fault)
            return None
        pending.results[choice] = result
        return self._write_answer(pending) if pending.complete and not self._broken else None

    def refuse(self, request_id: int, error: RowError) -> None:
        """Write an error row for the row of a request that the engine cannot answer. Raises
        JournalError."""
        number, _ = which_choice(request_id)
        pending = self._in_flight.get(number)
        if pending is not None and not self._broken:
            self._refuse(pending, error)

    def write(self) -> bool:
        """Write the lines so far, at most once a second: they survive this process. Returns whether
        it did; then `sync` makes them survive a power failure. Raises JournalError.

        Cheap enough to be called after every row.
        """
        if time.monotonic() - self._written_at < COMMIT_INTERVAL:
            return False
        for journal in self._journals:
            journal.write()
        self._written_at = time.monotonic()
        return True

    def sync(self) -> None:
        """Put on the disk what was written. `write` and `commit` raise what fails in it."""
        for journal in self._journals:
            journal.sync()

    def commit(self) -> None:
        """Write the lines so far and put them on the disk. Raises JournalError."""
        for journal in self._journals:
            journal.commit()

    def close(self, ordered: bool = False) -> None:
        """Commit and close. Rows in flight are left for a rerun, with what was saved of them;
        if there are none, the lines are put into the order of the input if `ordered`. Raises
        InputError and JournalError."""
        self._intake.look()
        self._in_flight.save_results()
        order = None
        try:
            try:
                self.commit()
            finally:
                self._journal.save_unfinished([] if self.complete else self._in_flight.begun)
            if ordered and self.complete:
                order = InputOrder(self._intake.again())
        finally:
            for journal in self._journals:
                journal.close(order)
            self._intake.close()
        for remark in remarks(self._intake):
            log.warning("%s", remark)

    def release(self) -> None:
        """Let other runs write the files, however this one ended."""
        for journal in self._journals:
            journal.release()

    @property
    def begun_rows(self) -> int:
        """Rows of which something is saved."""
        return self._in_flight.begun_rows

    @property
    def begun_tokens(self) -> int:
        """Output tokens that are saved."""
        return self._in_flight.begun_tokens

    @property
    def in_flight(self) -> int:
        """Rows handed out and not finished."""
        return len(self._in_flight)

    @property
    def answered_before(self) -> int:
        """Rows that earlier runs have answered."""
        return self._answered.lines - self._answered.failed

    @property
    def skipped(self) -> int:
        """Rows passed over so far, because an earlier run had answered them."""
        return self._intake.skipped

    @property
    def failed_before(self) -> int:
        """Error rows that the results file held at the start of this run."""
        return self._answered.failed

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
        """Whether every row of the input has its line, and the input is what it was."""
        intake = self._intake
        read = intake.exhausted and intake.torn is None and not intake.outdated
        return read and not self._in_flight and not self._broken

    @property
    def torn(self) -> bool:
        """Whether nothing is left but a last line of the input that has no end."""
        intake = self._intake
        return intake.torn is not None and not (self._in_flight or intake.outdated)

    @property
    def left_over(self) -> int | None:
        """Lines of rows that are not in the input any more; None until its last row was read."""
        return self._answered.left_over if self._intake.exhausted else None

    @property
    def names_left_over(self) -> list[str]:
        """custom_ids of some of these rows."""
        return self._answered.names_left_over(MOST_NAMED) if self._intake.exhausted else []

    @property
    def _broken(self) -> bool:
        """Whether a journal has failed."""
        return self._journal.broken or self._errors.broken

    @property
    def _journals(self) -> tuple[Journal, ...]:
        return tuple(dict.fromkeys((self._journal, self._errors)))

    def _read(self, envelope: Envelope) -> tuple[Entry, Sequence[Request]]:
        revision = self._answered.revision(envelope.number)
        try:
            row = parse_row(envelope, self._service)
        except RowError as error:
            known = envelope.number, envelope.custom_id, envelope.digest
            return Refused(*known, error, revision), ()
        return Pending.of(row, envelope.digest, revision, self._begun)

    def _write_answer(self, pending: Pending) -> Written | None:
        """The line of an answered row; an error row if its tokens cannot be turned into text."""
        row, service = pending.row, self._service
        results = [pending.results[choice] for choice in range(row.choices)]
        try:
            choices = [read_choice(result, row, service.tokenizer) for result in results]
        except RowError as error:
            self._refuse(pending, error)
            return None
        self._journal.append(
            answer_line(
                number=row.number,
                revision=pending.revision,
                custom_id=row.custom_id,
                digest=pending.request_digest,
                endpoint=row.endpoint,
                model=service.model_names[0],
                choices=choices,
                prompt_tokens=pending.prompt_tokens,
                created=int(time.time()),
            )
        )
        self._in_flight.leave(row.number)
        self.answered += 1
        return Written(results, row.custom_id, pending.prompt_tokens)

    def _refuse(self, pending: Pending, error: RowError) -> None:
        number, custom_id = pending.row.number, pending.row.custom_id
        self._write_error(number, custom_id, pending.request_digest, error, pending.revision)
        self._in_flight.leave(number)

    def _write_error(
        self,
        number: int,
        custom_id: str | None,
        request_digest: str,
        error: RowError,
        revision: int,
    ) -> None:
        self._errors.append(error_line(number, custom_id, error, request_digest, revision))
        self.failed += 1
