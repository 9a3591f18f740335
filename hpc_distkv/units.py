"""Numbers as people read them."""

from __future__ import annotations

import time

CLOCK = "%m-%d %H:%M:%S"
"""When a line of a log was written."""
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def stamped(text: str) -> str:
    """A line of a log, with the date and time of day where this runs: 12-31 23:59:59."""
    return f"{time.strftime(CLOCK)}  {text}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def short(number: float) -> str:
    """A number on an axis: 1,200 or 3.4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def seconds_text(seconds: float) -> str:
    """A time with its unit: 12 ms, 3.4 s, 5.6 min."""
    for limit, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(number: int) -> str:
    """Bytes, for people, in three digits or more: 15.5 GiB, 3584 MiB."""
    for unit, name in _UNITS:
        if number >= 10 * unit:
            digits = 0 if number >= 100 * unit else 1
            return f"{number / unit:.{digits}f} {name}"
    return f"{number} bytes"
