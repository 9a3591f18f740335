"""The whole job, from a batch file to a results file: what `hpc-distkv generate` and a program
that uses the library run."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from hpc_distkv.batch.errors import InputError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.service import Limits, SamplingDefaults, Service, end_ids, model_names
from hpc_distkv.batch.job import Job, job_fingerprint
from hpc_distkv.batch.results.files import Claims, Files
from hpc_distkv.comm.abort import aborting, failing
from hpc_distkv.comm.mpi.start import open_mpi
from hpc_distkv.comm.together import concluded, together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.decide.instance import Instance
from hpc_distkv.errors import FaultError, OptionError, UserError
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.fingerprint import model_fingerprint
from hpc_distkv.model.tokenizer import Tokenizer
from hpc_distkv.observe.live.leader import JobLeader
from hpc_distkv.observe.live.progress import ProgressReport
from hpc_distkv.observe.live.prometheus import PrometheusFile, run_labels
from hpc_distkv.observe.live.story import Story
from hpc_distkv.observe.live.watch import Watch
from hpc_distkv.observe.summary.earlier import write_anew
from hpc_distkv.observe.summary.metrics import RankFigures, peak_memory
from hpc_distkv.observe.summary.snapshot import Timeline
from hpc_distkv.observe.trace.spans import begin_trace, gather_traces
from hpc_distkv.observe.trace.trace_file import write_trace
from hpc_distkv.ranks.interrupt import Interrupt
from hpc_distkv.ranks.rank import joined
from hpc_distkv.start.loading import open_model
from hpc_distkv.start.options import EngineOptions

ROWS, RESULTS = "rows.jsonl", "results.jsonl"
"""Files of `Engine.generate`."""

T = TypeVar("T")


class Engine:
    """One rank's engine for a model directory. SPMD: every rank makes one with the same arguments
    and makes the same calls; rank 0 reads and writes the files.

        with Engine("models/SmolLM2-135M-Instruct") as engine:
            rows = engine.generate([{"custom_id": "1", "method": "POST", "url": "/v1/completions",
                                     "body": {"prompt": "Once upon a time", "max_tokens": 16}}])

    As a context manager, and while it loads, it ends the job on all ranks when one of them raises
    alone; what all of them raise together ends nobody else.
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
        with failing(self.comm):
            self._load(options or EngineOptions(), sampling or {}, max_model_len)

    def _load(
        self, settings: EngineOptions, sampling: Mapping[str, Any], max_model_len: int | None
    ) -> None:
        model = self.model
        self._weightless = settings.dummy
        self.config = self._together(lambda: ModelConfig.from_dir(model, settings.dummy))
        self.defaults = self._together(lambda: self._sampling(sampling))
        self.max_model_len = self._together(lambda: self.config.longest(max_model_len))
        # Stop strings are looked for where a row runs, so every rank has the tokenizer.
        self._tokenizer = self._together(lambda: Tokenizer(model, self.config.vocab_size))
        decoder = open_model(self.comm, model, self.config, settings)
        self.rank = joined(self.comm, decoder, settings, self._tokenizer)

    def _sampling(self, given: Mapping[str, Any]) -> SamplingDefaults:
        try:
            return msgspec.convert(asdict(self.config.generation) | dict(given), SamplingDefaults)
        except msgspec.ValidationError as error:
            raise OptionError(f"sampling: {error}") from None

    def __enter__(self) -> Engine:
        self._guard = aborting(self.comm)
        self._guard.__enter__()
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        return self._guard.__exit__(*raised)

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
        claimed. Returns the run's figures on rank 0, None elsewhere.

        Raises on all ranks, after which the engine goes on: SetupError where the job cannot start;
        what ends it on rank 0, as JournalError of a full disk, on the others RankError. The rows so
        far are in the results, and a rerun goes on. A `progress` that cannot print ends nothing."""
        leader, stop = None, Interrupt(also=interrupt)
        try:
            leader = self._each(
                lambda: self._lead(files, progress, claims, stop) if self._first else None
            )
            return self._answer(files, leader, stop)
        finally:
            if leader:
                leader.release()
            if progress:
                with contextlib.suppress(Exception):  # of which `Watch` has told
                    progress.close()

    def _answer(
        self, files: Files, leader: JobLeader | None, interrupt: Interrupt
    ) -> dict[str, Any] | None:
        """What the leader fails in ends the run, on all ranks alike; any other failure the job."""
        started = time.time()
        with failing(self.comm):
            trace = begin_trace(self.comm) if files.trace else None
            instance = self.rank.run(leader, trace, interrupt)
            ranks = self._gather(instance)
            spans = gather_traces(self.comm, trace) if trace else []

        def close() -> dict[str, Any] | None:
            if leader is None:
                return None
            closed = leader.close(ranks, self.comm.world, files.ordered)
            about = self._about(files, started, leader.resumed)
            if files.trace and trace and (timeline := leader.watch.timeline):
                of_run = (self.comm.world, spans, timeline.snapshots, trace.origin, about)
                write_anew(files.trace, about, "trace", lambda path: write_trace(path, *of_run))
            return {"job": about, **closed}

        try:  # Others are patient: rank 0 may have millions of lines to put in order.
            return concluded(self.comm, close)
        except UserError as error:  # as of a full disk: the job was right, and is to be rerun
            error.exit_code = FaultError.exit_code
            raise

    def generate(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer OpenAI batch rows; returns OpenAI batch response rows in the order of `rows` on
        rank 0, [] elsewhere, where `rows` is not looked at. Raises on all ranks, after which the
        engine goes on: SetupError for what a user can mend, also a row that JSON cannot hold; else
        rank 0 what it met, as in `rows`, and the others RankError."""
        folder = self._each(lambda: _spool(rows) if self._first else None)
        try:
            place = Path(folder.name if folder else os.devnull)
            files = Files(place / ROWS, place / RESULTS)
            self.run(files)
            return self._each(lambda: _read_answers(files.output) if self._first else [])
        finally:
            if folder:
                folder.cleanup()

    @property
    def _first(self) -> bool:
        return self.comm.world.rank == 0

    def _lead(
        self,
        files: Files,
        progress: ProgressReport | None,
        claims: Claims | None,
        interrupt: Interrupt,
    ) -> JobLeader:
        labels, world = run_labels(files.output), self.comm.world
        watch = Watch(
            progress,
            PrometheusFile(files.prometheus, labels) if files.prometheus else None,
            Timeline(world.instances) if files.trace else None,
            Story(progress.say, world, interrupt) if progress else None,
        )
        job = self._open(files, claims)
        try:
            return JobLeader(self.rank, job, watch, interrupt)
        except BaseException:
            job.release()
            raise

    def _gather(self, instance: Instance) -> list[RankFigures]:
        own = RankFigures(instance.counters, peak_memory(), torch.get_num_threads())
        messages = self.comm.gather(msgspec.msgpack.encode(own))
        return [msgspec.msgpack.decode(message, type=RankFigures) for message in messages]

    def _about(self, files: Files, started: float, resumed: bool) -> dict[str, Any]:
        """What the job was, for who finds its figures later."""
        world, config = self.comm.world, self.rank.config
        return {
            "version": version("hpc-distkv"),
            "model": str(self.model),
            "input": str(files.input),
            "output": os.path.realpath(files.output),
            "shard": str(files.shard) if files.shard else None,
            "resumed": resumed or files.restarted,
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT"),
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "ranks": world.size,
            "instances": world.instances,
            "tensor_parallel_size": world.tp,
            "nodes": max(world.nodes) + 1,
            "dtype": self.rank.dtype,
            "block_size": config.block_size,
            "num_blocks": config.num_blocks,
            "host_blocks": config.host_blocks,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "lending": config.policy.lending,
        }

    def _open(self, files: Files, claims: Claims | None) -> Job:
        most = self.config.max_position
        limits = Limits(self.max_model_len, self.rank.capacity_tokens, most)
        service = Service.from_dir(self.model, self.config, limits, self.defaults, self._tokenizer)
        claims = claims or files.claim()
        try:
            intake = Intake(files.input, files.shard)
            fingerprint = job_fingerprint(
                self._fingerprint,
                model_names(self.model)[0],
                self.defaults,
                files.shard,
                self.config.fingerprint,
            )
            results, errors = files.open(claims, fingerprint)
            return Job(intake, results, service, errors)
        except BaseException:
            claims.release()
            raise

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        """Of the model, for results to know it by. Raises ModelError."""
        return model_fingerprint(
            self.model,
            self.config,
            self._tokenizer,
            end_ids(self.config, self._tokenizer),
            self.rank.dtype,
            self._weightless,
        )

    def _together(self, prepare: Callable[[], T]) -> T:
        return together(self.comm, prepare)

    def _each(self, prepare: Callable[[], T]) -> T:
        """As `_together`, for what is not collective: whatever a rank raises, all of them do."""
        return together(self.comm, prepare, BaseException)


def _spool(rows: Iterable[dict[str, Any]]) -> tempfile.TemporaryDirectory[str]:
    """A folder with `rows` as a batch file. Raises InputError, and what `rows` raises."""
    folder = tempfile.TemporaryDirectory(prefix="hpc-distkv-", ignore_cleanup_errors=True)
    try:
        _write_rows(rows, Path(folder.name, ROWS))
    except BaseException:
        folder.cleanup()
        raise
    return folder


def _read_answers(results: Path) -> list[dict[str, Any]]:
    """In the order of the rows."""
    answers = [json.loads(line) for line in results.read_bytes().splitlines()]
    return sorted(answers, key=lambda row: int(row["id"].rpartition("_")[2]))


def _write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """As a batch file. Raises InputError."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"rows must be a list of batch rows, each a dict, not one {type(rows)}.")
    with path.open("w") as file:
        for number, row in enumerate(rows):
            try:
                file.write(f"{json.dumps(row)}\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"rows[{number}] cannot be written as JSON ({error}): give plain int, float, "
                    "str, list and dict, for example array.tolist()."
                ) from None
