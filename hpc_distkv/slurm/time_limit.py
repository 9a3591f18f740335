"""Time limits of jobs."""

from __future__ import annotations

import re

_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
    r"|(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+)|(?i:unlimited|infinite))",
    re.ASCII,
)
"""Time limits of sbatch: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]]."""


def seconds(limit: str) -> int | None:
    """Of a time limit of sbatch, 0 for none; None: it is no time."""
    if not (match := _TIME.fullmatch(limit)):
        return None
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * part["days"] + part["h"] + part["hours"]
    return (
        3600 * hours
        + 60 * (part["m"] + part["minutes"] + part["only"])
        + (part["s"] + part["seconds"])
    )
