"""Answers that a run was stopped before it could finish: kept beside the results for the rerun."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from hpc_distkv.batch.answers.line import json_line
from hpc_distkv.batch.errors import JournalError
from hpc_distkv.control.messages.requests import Request, Result, unpack_tokens
from hpc_distkv.regular import open_regular, replace_file


class AnswerKey(NamedTuple):
    """One answer of one row."""

    custom_id: str
    choice: int
    """Which of the row's answers it is."""


class Begun(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an earlier run has made of one answer: tokens so far, or the whole result."""

    custom_id: str
    choice: int
    request: str
    """`begun_digest` of what was asked."""
    output: bytes = b""
    """`pack_tokens` of the output so far."""
    logprobs: bytes = b""
    """`pack_logprobs` of `output`, if asked for."""
    result: Result | None = None
    """The whole answer, when others of its row were not finished."""

    @property
    def key(self) -> AnswerKey:
        """Which answer it is."""
        return AnswerKey(self.custom_id, self.choice)

    @property
    def tokens(self) -> int:
        """Of the output so far."""
        return len(self.result.tokens if self.result else self.output) // 4

    def fits(self, request: Request) -> bool:
        """True if the answer to `request` starts with these tokens: it asks for the same, and for
        more tokens than there are, or for just as many if the result has ended with them."""
        limit = request.sampling.max_tokens
        if self.result is None:
            fits = self.tokens < limit
        elif self.result.finish_reason == "length":
            fits = self.tokens == limit
        else:
            fits = self.tokens + (not _ended(self.result, request)) <= limit
        return fits and self.request == begun_digest(request)


def _ended(result: Result, request: Request) -> bool:
    """Whether a result includes the stop token that ended it. Earlier versions left that out."""
    last = unpack_tokens(result.tokens[-4:])
    stops = request.sampling.stop_token_ids
    return result.text_end is not None or not set(last).isdisjoint(stops)


def begun_digest(request: Request) -> str:
    """Hash of all that decides the tokens of an output: the prompt, and all sampling fields but
    `max_tokens`."""
    sampling = msgspec.structs.replace(request.sampling, max_tokens=0)
    asked = msgspec.msgpack.encode((request.prompt, sampling))
    return hashlib.blake2b(asked, digest_size=16).hexdigest()


def read_unfinished(path: Path) -> dict[AnswerKey, Begun]:
    """What `write_unfinished` wrote; nothing if there is no such file. Raises JournalError, OSError
    when reading fails."""
    try:
        with open_regular(path) as lines:
            begun = [msgspec.json.decode(line, type=Begun) for line in lines]
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise JournalError(
            f"{path} does not hold answers that were begun ({error}). Remove it to compute these "
            "rows from their start."
        ) from None
    return {each.key: each for each in begun}


def check_unfinished(path: Path) -> dict[AnswerKey, Begun]:
    """An empty dict, for a job that will remove the file of another one. Raises JournalError if the
    first line there is not of this program, and OSError."""
    try:
        with open_regular(path) as lines:
            if first := lines.readline():
                msgspec.json.decode(first, type=Begun)
    except FileNotFoundError:
        pass
    except (ValueError, RecursionError):
        raise JournalError(
            f"{path} is not this program's, and in its way: move it, or give another output."
        ) from None
    return {}


def write_unfinished(path: Path, begun: Iterable[Begun]) -> None:
    """Replace the file in one piece. Raises OSError."""
    replace_file(path, (json_line(each) + b"\n" for each in begun))
