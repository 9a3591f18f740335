"""The files of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.input.intake import Intake
from hpc_distkv.batch.input.shard import Shard
from hpc_distkv.batch.results.answered import Answered
from hpc_distkv.batch.results.claim import Claim
from hpc_distkv.batch.results.journal import Journal
from hpc_distkv.batch.results.opening import Opening, Reuse, check_place
from hpc_distkv.batch.results.side_files import is_side_file, remove_leftovers
from hpc_distkv.regular import same_file


@dataclass(frozen=True)
class Files:
    """Where rows come from and answers go. They are claimed first, then opened."""

    input: Path
    output: Path
    overwrite: bool = False
    prometheus: Path | None = None
    """The state of the run, every few seconds."""
    trace: Path | None = None
    """When which rank did what, at the end."""
    retry_errors: bool = False
    """Drop the error rows that there are, and answer these rows again."""
    retry_changed: bool = False
    """Drop the lines of rows that were edited since, and answer these rows again."""
    errors: Path | None = None
    """Where error rows go; None: among the results."""
    shard: Shard | None = None
    """The part of the input to answer; None: all of it."""
    ordered: bool = False
    """Put the results into the order of the input when all are there."""
    job: str | None = None
    """Slurm's job id."""
    restarted: bool = False
    """Whether that job was started before."""

    def claim(self) -> Claims:
        """Check that the files can be used, and claim those that are written. Raises InputError and
        JournalError."""
        Intake(self.input).close()
        for path in self._outputs:
            check_place(path, self.input)
        self._check_apart()
        claims = Claims()
        try:
            for path in self._outputs:
                claims[path] = Claim.take(path)
                remove_leftovers(claims[path].output)
        except JournalError:
            claims.release()
            raise
        return claims

    def hold(self, path: Path) -> bool:
        """Whether `path` is one of these files, or lies beside one as its side file."""
        files = (self.input, *self._outputs)
        return any(same_file(path, file) for file in files) or any(
            is_side_file(path, output) for output in self._outputs
        )

    def open(
        self, claims: Claims, fingerprint: Mapping[str, Any]
    ) -> tuple[Journal, Journal | None]:
        """The journals of the results and, if there is one, of the error rows; no file is changed
        if one is refused. Raises JournalError."""
        reuse = Reuse(self.overwrite, self.retry_errors, self.job, self.restarted)
        look = partial(Opening.look, fingerprint=fingerprint, reuse=reuse, source=self.input)
        openings = [look(claims[self.output], errors=self.errors)]
        if self.errors:
            openings.append(look(claims[self.errors]))
            self._check_once(*openings)
        changed = self._changed(openings) if self.retry_changed else frozenset()
        journals = [opening.begin(changed) for opening in openings]
        return journals[0], journals[1] if self.errors else None

    @property
    def _outputs(self) -> list[Path]:
        return [self.output] if self.errors is None else [self.output, self.errors]

    def _check_apart(self) -> None:
        """Raise JournalError if a file is also another one, or a side file of it."""
        if self.errors and same_file(self.output, self.errors):
            raise JournalError(f"{self.errors} is both the results and the error file.")
        for output in self._outputs:
            for path in (self.input, *self._outputs):
                if is_side_file(path, output):
                    raise JournalError(
                        f"{path} has a name that this program uses beside {output}, and would be "
                        "overwritten: give one of them another name."
                    )

    def _check_once(self, results: Opening, errors: Opening) -> None:
        both = results.answered.custom_ids & errors.answered.custom_ids
        if both and not self.retry_errors:
            raise JournalError(
                f"{len(both)} rows have a line in {self.output} and one in {self.errors}, such as "
                f"'{min(both)}': use --retry-errors to drop error rows, or remove those lines."
            )

    def _changed(self, openings: Iterable[Opening]) -> frozenset[str]:
        """custom_ids of rows that were edited since they were answered: reads the whole input.
        Raises InputError."""
        answered = Answered()
        for opening in openings:
            answered.include(opening.answered)
        intake = Intake(self.input, self.shard)
        try:
            for _ in intake.envelopes(answered):
                pass
        finally:
            intake.close()
        return frozenset(intake.changed)


class Claims(dict[Path, Claim]):
    """A run's claims, by file."""

    def release(self) -> None:
        """Let others write them."""
        for claim in self.values():
            claim.release()
