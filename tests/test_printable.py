"""What people read shows every character as itself, or spelled out."""

from __future__ import annotations

import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.printable import LAYOUT, PrintableFormatter, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("na\u00efve \u4f60\u597d", "na\u00efve \u4f60\u597d"),
        ("\U0001f9ff\u3000\u00a0.", "\U0001f9ff\u3000\u00a0."),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b2J\x7f\x85", r"\x9b2J\x7f\x85"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202eabc\u2069 \u200f", r"\u202eabc\u2069 \u200f"),
        ("\u2028\u2029\ufeff", r"\u2028\u2029\ufeff"),
        ("\ud800", r"\ud800"),
    ],
)  # fmt: skip
def test_what_is_not_seen_as_itself_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=[])))
def test_no_text_has_anything_else(text: str) -> None:
    kinds = {unicodedata.category(letter) for letter in printable(text)}
    assert not kinds & {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
    assert set(printable(text, keep=LAYOUT)) - set(printable(text)) <= set(LAYOUT)
    assert len(printable(text).splitlines()) <= 1


def test_log_lines() -> None:
    record = logging.LogRecord("a", logging.WARNING, "", 0, "of %s\nmore", ("\x1b[2J",), None)
    shown = PrintableFormatter("%(levelname)s %(name)s: %(message)s").format(record)
    assert shown == "WARNING a: of \\x1b[2J\nmore"
