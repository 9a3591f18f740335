"""The whole job, from a batch file to a results file: what `hpc-distkv generate` and a program
that uses the library run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from hpc_distkv.batch.claim import Claim
from hpc_distkv.batch.errors import InputError, JournalError
from hpc_distkv.batch.intake import Intake
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.journal import Journal, check_place
from hpc_distkv.batch.service import Limits, SamplingDefaults, Service, model_names
from hpc_distkv.batch.shard import Shard
from hpc_distkv.comm.abort import aborting
from hpc_distkv.comm.mpi import open_mpi
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages import Result, Unfinished
from hpc_distkv.engine.config import OptionError
from hpc_distkv.engine.interrupt import Interrupt
from hpc_distkv.engine.rank import EngineOptions, RankEngine, load_model
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.tokenizer import Tokenizer
from hpc_distkv.observe.metrics import peak_memory
from hpc_distkv.observe.progress import ProgressReport, State
from hpc_distkv.observe.run import RunRecord

USER_ERRORS = (ModelError, InputError, JournalError, OptionError)
"""What a user can cause and mend: shown as a sentence, not as a traceback."""

T = TypeVar("T")


class SetupError(Exception):
    """The job cannot start, on at least one rank; all ranks raise it together."""


@dataclass(frozen=True)
class Files:
    """Where rows come from and answers go."""

    input: Path
    output: Path
    overwrite: bool = False
    retry_errors: bool = False
    """Drop the error rows that there are, and answer these rows again."""
    errors: Path | None = None
    """Where error rows go; None: among the results."""
    shard: Shard | None = None
    """The part of the input to answer; None: all of it."""
    ordered: bool = False
    """Put the results into the order of the input when all are there."""

    def claim(self) -> Claims:
        """Claim the files to be written for this run, having looked whether they can be used.
        Raises InputError and JournalError."""
        Intake(self.input).close()
        outputs = [self.output] if self.errors is None else [self.output, self.errors]
        if len({path.resolve() for path in outputs}) < len(outputs):
            raise JournalError(f"{self.errors} is both the results and the error file.")
        for path in outputs:
            check_place(path, self.input)
        claims = Claims()
        try:
            for path in outputs:
                claims[path] = Claim.take(path)
        except JournalError:
            claims.release()
            raise
        return claims


class Claims(dict[Path, Claim]):
    """A run's claims of the files that it writes."""

    def release(self) -> None:
        """Let others write them."""
        for claim in self.values():
            claim.release()


def together(comm: Comm, prepare: Callable[[], T]) -> T:
    """The result of `prepare`, which is not collective, unless a rank has a user error: then all
    ranks raise SetupError. Collective."""
    result, error = None, None
    try:
        result = prepare()
    except USER_ERRORS as problem:
        error = str(problem)
    for rank, said in enumerate(comm.agree(error)):
        if said is not None:
            where = f" ({comm.world.name(rank)})" if rank else ""
            raise SetupError(said + where)
    return cast(T, result)


class Engine:
    """One rank's engine for a model directory. SPMD: every rank makes one with the same arguments
    and makes the same calls; rank 0 reads and writes the files.

        with Engine("models/SmolLM2-135M-Instruct") as engine:
            rows = engine.generate([{"custom_id": "1", "method": "POST", "url": "/v1/completions",
                                     "body": {"prompt": "Once upon a time", "max_tokens": 16}}])

    As a context manager it ends the job on all ranks when one of them raises.
    """

    def __init__(
        self,
        model: str | Path,
        options: EngineOptions | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        comm: Comm | None = None,
        stall_timeout: float = 300.0,
    ) -> None:
        """Load the model. `sampling` holds for fields that a row leaves out (temperature, top_p,
        top_k, min_p, repetition_penalty, max_tokens, seed), before the checkpoint's own settings.
        Raises SetupError on all ranks if one cannot."""
        self.model = Path(model)
        self.comm = comm or open_mpi(stall_timeout)
        self.config = self._together(lambda: ModelConfig.from_dir(model))
        self.defaults = SamplingDefaults(**(asdict(self.config.generation) | dict(sampling or {})))
        self.max_model_len = max_model_len or self.config.max_position
        settings = options or EngineOptions()
        # Stop strings are looked for where a row runs, so every rank has the tokenizer.
        self._tokenizer = self._together(lambda: Tokenizer(model))
        decoder = self._together(lambda: load_model(self.comm, model, settings))
        # All ranks of a node have loaded their weights when the first one looks what is left.
        self.rank = self._together(
            lambda: RankEngine(self.comm, decoder, settings, self._tokenizer)
        )
        self.rank.join()

    def __enter__(self) -> Engine:
        self._guard = aborting(self.comm, USER_ERRORS)
        self._guard.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._guard.__exit__(kind, error, trace)

    def run(
        self,
        files: Files,
        progress: ProgressReport | None = None,
        *,
        interrupt: Interrupt | None = None,
        claims: Claims | None = None,
    ) -> dict[str, Any] | None:
        """Answer every row of a batch file, or as many as there is time for until `interrupt`;
        resumes if the results file holds answers already. `claims`, on rank 0, if `files` have been
        claimed. Returns the run's figures on rank 0, None elsewhere. Raises SetupError on all
        ranks."""
        job = self._together(lambda: self._open(files, claims) if self._first else None)
        leader = JobLeader(self.rank, job, progress) if job else None
        self.rank.run(leader, interrupt)
        peaks = self.comm.share(peak_memory())
        return leader.close(peaks, files.ordered) if leader else None

    def generate(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer OpenAI batch rows; returns OpenAI batch response rows in the order of `rows` on
        rank 0, [] elsewhere, where `rows` is not looked at. Raises SetupError on all ranks."""
        with tempfile.TemporaryDirectory(prefix="hpc-distkv-") as folder:
            files = Files(Path(folder) / "rows.jsonl", Path(folder) / "results.jsonl")
            if self._first:
                lines = (json.dumps(row) for row in rows)
                files.input.write_text("".join(f"{line}\n" for line in lines))
            self.run(files)
            if not self._first:
                return []
            answers = [json.loads(line) for line in files.output.read_bytes().splitlines()]
        return sorted(answers, key=lambda row: int(row["id"].rpartition("_")[2]))

    @property
    def _first(self) -> bool:
        return self.comm.world.rank == 0

    def _open(self, files: Files, claims: Claims | None) -> Job:
        limits = Limits(self.max_model_len, self.rank.capacity_tokens)
        service = Service.from_dir(self.model, self.config, limits, self.defaults, self._tokenizer)
        fingerprint = job_fingerprint(
            self.config.fingerprint, model_names(self.model)[0], self.defaults, files.shard
        )
        claims = claims or files.claim()

        def journal(path: Path) -> Journal:
            return Journal.open(
                path,
                fingerprint,
                overwrite=files.overwrite,
                retry_errors=files.retry_errors,
                source=files.input,
                claim=claims[path],
            )

        try:
            intake = Intake(files.input, files.shard)
            errors = journal(files.errors) if files.errors else None
            return Job(intake, journal(files.output), service, errors)
        except USER_ERRORS:
            claims.release()
            raise

    def _together(self, prepare: Callable[[], T]) -> T:
        return together(self.comm, prepare)


class JobLeader:
    """What rank 0 does beside its own work: feed the gManager, keep results, show progress."""

    def __init__(self, engine: RankEngine, job: Job, progress: ProgressReport | None) -> None:
        self.gmanager = engine.gmanager(job.requests())
        self._job = job
        self._progress = progress
        self._record = RunRecord()

    def finish(self, result: Result) -> None:
        """Write a row's answer."""
        self._job.finish(result)
        self._record.add(result)

    def put_aside(self, unfinished: Unfinished) -> None:
        """Keep what was made of a row for the rerun."""
        self._job.put_aside(unfinished)

    def tick(self) -> None:
        """After every control round: make results durable and show how far the run is."""
        self._job.commit()
        if self._progress and self._progress.due:
            self._progress.show(self._state())

    def close(self, peak_memory: list[int], ordered: bool) -> dict[str, Any]:
        """Close the files; the figures of the run."""
        self._job.close(ordered)
        if self._progress:
            self._progress.close()
        rows = {
            "answered": self._job.answered,
            "failed": self._job.failed,
            "answered_before": self._job.skipped - self._job.failed_before,
            "failed_before": self._job.failed_before,
            "total": self._job.total_rows,
            "put_aside": self._job.begun_rows,
        }
        stopped = {"stopped": not self._job.complete, "put_aside_tokens": self._job.begun_tokens}
        return {
            "rows": rows,
            **stopped,
            **self._record.summary(self.gmanager.counters, peak_memory),
        }

    def _state(self) -> State:
        job, manager = self._job, self.gmanager
        done = job.answered + job.failed
        # Rows that were read and wait for their answer are not behind us.
        read = job.bytes_read / max(1, job.input_bytes)
        return State(
            fraction=read * done / max(1, done + job.in_flight),
            rows=done + job.skipped,
            failed=job.failed,
            running=manager.running,
            tokens=sum(c.prompt_tokens + c.generated_tokens for c in manager.counters),
            used=1 - manager.free / max(1, manager.capacity),
            lent=sum(blocks for _, _, blocks in manager.ledger.pairs()),
        )
