"""The rows of a job that are handed out, and what was begun of those that have no line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from hpc_distkv.batch.input.rows import Row
from hpc_distkv.batch.results.unfinished import AnswerKey, Begun, begun_digest
from hpc_distkv.control.messages.requests import Request, Result
from hpc_distkv.model.detokenizer import CONTEXT


@dataclass(frozen=True, slots=True)
class Pending:
    """A row that is handed out."""

    row: Row
    """Without most of its prompt."""
    prompt_tokens: int
    asked: tuple[str, ...]
    """`begun_digest` of the request of each of its answers."""
    request_digest: str
    """Of the row."""
    revision: int
    """Of its line."""
    results: dict[int, Result] = field(default_factory=dict)
    """By choice."""

    @classmethod
    def of(
        cls, row: Row, request_digest: str, revision: int, begun: Mapping[AnswerKey, Begun]
    ) -> tuple[Pending, list[Request]]:
        """A row, and its requests from where an earlier run left off (`begun`). It is complete if
        that run has made all its answers, as when `n` was lowered since."""
        requests = list(row.requests())
        pending = cls(
            replace(row, prompt=row.prompt[-CONTEXT:]),
            len(row.prompt),
            tuple(map(begun_digest, requests)),
            request_digest,
            revision,
        )
        left = []
        for choice, request in enumerate(requests):
            made = begun.get(AnswerKey(row.custom_id, choice))
            if made is None or not made.fits(request):
                left.append(request)
            elif made.result:
                pending.results[choice] = made.result
            else:
                kept = {"output": made.output, "logprobs": made.logprobs}
                left.append(msgspec.structs.replace(request, **kept))
        return pending, left

    @property
    def complete(self) -> bool:
        """Whether all results are there: then the row is written."""
        return len(self.results) == self.row.choices


class InFlight:
    """Owner of the rows that are handed out, and of what was begun of them. A row leaves once its
    line is in the journal."""

    def __init__(self, begun: Mapping[AnswerKey, Begun]) -> None:
        """`begun`: by earlier runs, of rows that have no line."""
        self._begun = dict(begun)
        self._pending: dict[int, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def get(self, number: int) -> Pending | None:
        """A row by its number; None if it has left."""
        return self._pending.get(number)

    def enter(self, pending: Pending) -> None:
        """A row is handed out."""
        self._pending[pending.row.number] = pending

    def leave(self, number: int) -> None:
        """The row has its line."""
        row = self._pending.pop(number).row
        for choice in range(row.choices):
            self._begun.pop(AnswerKey(row.custom_id, choice), None)

    def save(self, number: int, choice: int, **made: Any) -> None:
        """Keep what was made of one answer of a row, unless that has left. `made`: fields of
        `Begun`."""
        if pending := self._pending.get(number):
            answer = AnswerKey(pending.row.custom_id, choice)
            self._begun[answer] = Begun(*answer, pending.asked[choice], **made)

    def save_results(self) -> None:
        """Keep the answers of rows whose others are not there."""
        for number, pending in self._pending.items():
            for choice, result in pending.results.items():
                self.save(number, choice, result=result)

    @property
    def begun(self) -> Collection[Begun]:
        """What is kept."""
        return self._begun.values()

    @property
    def begun_rows(self) -> int:
        """Rows of which something is kept."""
        return len({answer.custom_id for answer in self._begun})

    @property
    def begun_tokens(self) -> int:
        """Output tokens that are kept."""
        return sum(begun.tokens for begun in self.begun)
