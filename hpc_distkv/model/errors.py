"""The error of this package."""

from __future__ import annotations

from hpc_distkv.errors import UserError

LONGEST_MESSAGE = 1000
"""Characters; messages quote what files say."""


class ModelError(UserError):
    """A model directory, or a request to its tokenizer or chat template, that cannot be used.

    The message names the file or key, and says what to do about it. It is one line of printable
    text, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` as one line that can be shown and encoded: white space is a blank, and what is no
    printable character is escaped. Of a long one the middle is left out."""
    return _cut("".join(c if c.isprintable() else _escaped(c) for c in _cut(text)))


def _cut(text: str) -> str:
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} … {text[-half:]}"


def _escaped(character: str) -> str:
    return " " if character.isspace() else ascii(character)[1:-1]


class TooLongError(ModelError):
    """A text has more tokens than will do."""
