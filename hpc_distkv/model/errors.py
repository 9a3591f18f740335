"""The error of this package."""

from __future__ import annotations

from hpc_distkv.errors import UserError
from hpc_distkv.printable import printable

LONGEST_MESSAGE = 1000
"""Characters; messages quote what files say."""


class ModelError(UserError):
    """A model directory, or a request to its tokenizer or chat template, that cannot be used.

    The message names the file or key, and says what to do about it. It is one line of printable
    text, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_cut(printable(_cut(message))))


def _cut(text: str) -> str:
    """Without the middle of a long one."""
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} … {text[-half:]}"


class TooLongError(ModelError):
    """A text has more tokens than will do."""
