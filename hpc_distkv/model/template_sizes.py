"""The sizes of what a chat template makes, computed before it is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from itertools import chain
from typing import Any

from hpc_distkv.model.errors import ModelError, TooLongError

LONGEST = 64 << 20
"""Characters of any text that a template makes, and elements of any list."""
_MOST_BITS = 1 << 16
"""Of a whole number that it computes."""
_PERCENT_WIDTH = re.compile(r"(\d+)(?=[.hlLdiouxXeEfFgGcrsa%])")
"""Digits that may be the width or the precision of a `%` field."""


def check(size: int) -> None:
    """Raise TooLongError for a text of `size` characters that is too long."""
    if size > LONGEST:
        raise TooLongError(f"the chat template makes more than {LONGEST} characters of it")


def spelled(value: Any) -> int:
    """About the characters of `value` as text, a part counted wherever it stands: lists that hold
    one list twice, and so on, are small in memory and endless as text."""
    return len(value) if isinstance(value, str) else _spelled(value, {})


def _spelled(value: Any, known: dict[int, int]) -> int:
    """`known`: that of collections, by their ids."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, Collection) or isinstance(value, range):
        return 1
    if id(value) not in known:
        pairs = isinstance(value, Mapping)
        parts = chain(value.keys(), value.values()) if isinstance(value, Mapping) else value
        size = sum(_spelled(part, known) for part in parts)
        known[id(value)] = size + (1 + pairs) * len(value) + 1
    return known[id(value)]


def written(value: Any) -> str:
    """`value` as text. Raises TooLongError."""
    if isinstance(value, str):
        return value
    check(spelled(value))
    return str(value)


def both(value: Any, other: Any) -> int:
    """The larger size of two that are compared."""
    return max(spelled(value), spelled(other))


def concatenated(parts: Iterable[str]) -> str:
    """All `parts` as one text. Raises TooLongError."""
    return "".join(joinable("", parts))


def joinable(separator: str, parts: Iterable[Any]) -> list[Any]:
    """The `parts` of a text with `separator` between them. Raises TooLongError before they are
    all made."""
    kept, size = [], 0
    for part in parts:
        size += spelled(part) + len(separator)
        check(size)
        kept.append(part)
    return kept


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise ModelError if `left operator right` is too large; for `+`, `*`, `**` and `%`."""
    if operator == "%":
        if isinstance(left, str):
            check(_percent(left, right))
    elif isinstance(left, int) and isinstance(right, int):
        left_bits, right_bits = left.bit_length(), right.bit_length()
        bits = {"+": 1, "*": left_bits + right_bits, "**": left_bits * max(right, 1)}[operator]
        if bits > _MOST_BITS:
            raise ModelError("the chat template computes a number of too many digits")
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        check(len(left) + len(right))
    else:
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, Sized) and isinstance(times, int):
                check(len(sized) * times)


def _percent(text: str, values: Any) -> int:
    """Of `text % values`: as if each field had the largest of widths and values."""
    given = values if isinstance(values, tuple) else (values,)
    widths = [int(digits[:9]) for digits in _PERCENT_WIDTH.findall(text)]
    if "*" in text:
        widths += [abs(value) for value in given if isinstance(value, int)]
    largest = max(widths, default=0) + max(map(spelled, given), default=0)
    return len(text) + text.count("%") * largest


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    times = written(text).count(written(old))
    if count is not None and count >= 0:
        times = min(times, count)
    return spelled(text) + times * spelled(new)


def _with_tabs(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * tabsize


def _filled(text: Any, width: int = 80, *_: Any) -> int:
    size: int = max(spelled(text), width)
    return size


def _indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    lines = len(written(text).splitlines()) + 1
    return spelled(text) + lines * (width if isinstance(width, int) else len(width) + 1)


def _wrapped(text: Any, *args: Any, wrapstring: str | None = None, **kwargs: Any) -> int:
    between = [arg for arg in (*args, wrapstring) if isinstance(arg, str)]
    return spelled(text) * (1 + max(map(len, between), default=1))


def _cut_up(value: Any, size: int, *_: Any, **__: Any) -> int:
    """Of as many parts as are asked for, or a last one that is filled up."""
    return size


def _first(value: Any, *_: Any, **__: Any) -> int:
    return spelled(value)


COMPARING = (
    *("==", "eq", "equalto", "!=", "ne", "in"),
    *("<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan", ">=", "ge"),
)
"""Tests that compare what they are given."""

METHODS: Mapping[str, Callable[..., int]] = {
    "replace": _replaced,
    "expandtabs": _with_tabs,
    **dict.fromkeys(("ljust", "rjust", "center", "zfill"), _filled),
}
"""Of texts → the size of what they make."""

FILTERS: Mapping[str, Callable[..., int]] = {
    "replace": _replaced,
    "center": _filled,
    "indent": _indented,
    "wordwrap": _wrapped,
    **dict.fromkeys(("batch", "slice"), _cut_up),
    "format": lambda text, *args, **kwargs: _percent(written(text), kwargs or args),
    **dict.fromkeys(
        (
            *("capitalize", "e", "escape", "forceescape", "lower", "pprint", "safe", "string"),
            *("striptags", "title", "trim", "truncate", "upper", "urlencode", "wordcount"),
            *("xmlattr", "dictsort", "groupby", "max", "min", "sort", "sum", "unique"),
        ),
        _first,
    ),
}
"""The same of filters, and of those that write out or compare what they are given."""
