"""Words for people, on a terminal or in a log: nothing that a row or a file holds can move the
cursor, colour or reverse what is read, or pass for another line."""

from __future__ import annotations

import logging
import unicodedata

LAYOUT = "\n\t"
"""What messages of several lines keep."""


def printable(text: str, keep: str = "") -> str:
    """`text` with escapes for what is not seen as itself: control characters, those that set the
    direction of writing, line separators, halves of surrogate pairs; but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(_escape(letter) if _hidden(letter, keep) else letter for letter in text)


def _hidden(letter: str, keep: str) -> bool:
    visible = letter.isprintable() or unicodedata.category(letter) == "Zs"
    return not visible and letter not in keep


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


class PrintableFormatter(logging.Formatter):
    """Log lines that are `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return printable(super().format(record), keep=LAYOUT)
