"""The files of one run: looked at, claimed and opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc_distkv.batch.claim import Claim
from hpc_distkv.batch.errors import JournalError
from hpc_distkv.batch.intake import Intake
from hpc_distkv.batch.journal import Journal
from hpc_distkv.batch.opening import Opening, Reuse, check_place
from hpc_distkv.batch.shard import Shard


@dataclass(frozen=True)
class Files:
    """Where rows come from and answers go."""

    input: Path
    output: Path
    overwrite: bool = False
    prometheus: Path | None = None
    """The state of the run, every few seconds."""
    trace: Path | None = None
    """When which rank did what, at the end."""
    retry_errors: bool = False
    """Drop the error rows that there are, and answer these rows again."""
    errors: Path | None = None
    """Where error rows go; None: among the results."""
    shard: Shard | None = None
    """The part of the input to answer; None: all of it."""
    ordered: bool = False
    """Put the results into the order of the input when all are there."""
    job: str | None = None
    """Slurm's job id."""
    restarted: bool = False
    """Whether that job was started before, and goes on where it was."""

    def claim(self) -> Claims:
        """Claim the files to be written for this run, having looked whether they can be used.
        Raises InputError and JournalError."""
        Intake(self.input).close()
        outputs = [self.output] if self.errors is None else [self.output, self.errors]
        for path in outputs:
            check_place(path, self.input)
        if len({path.resolve() for path in outputs}) < len(outputs):
            raise JournalError(f"{self.errors} is both the results and the error file.")
        claims = Claims()
        try:
            for path in outputs:
                claims[path] = Claim.take(path)
        except JournalError:
            claims.release()
            raise
        return claims

    def open(
        self, claims: Claims, fingerprint: Mapping[str, Any]
    ) -> tuple[Journal, Journal | None]:
        """The journals of the results and, if there is one, of the error rows; no file is changed
        if one is refused. Raises JournalError."""
        reuse = Reuse(self.overwrite, self.retry_errors, self.job, self.restarted)
        look = partial(Opening.look, fingerprint=fingerprint, reuse=reuse, source=self.input)
        results = look(claims[self.output], errors=self.errors)
        errors = look(claims[self.errors]) if self.errors else None
        return results.begin(), errors.begin() if errors else None


class Claims(dict[Path, Claim]):
    """A run's claims of the files that it writes."""

    def release(self) -> None:
        """Let others write them."""
        for claim in self.values():
            claim.release()
