"""What there is to say of an input beside its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpc_distkv.batch.input.intake import Intake

MOST_NAMED = 3
"""Rows that a sentence names."""


def named(custom_ids: Sequence[str], count: int) -> str:
    """The first ones of `count` rows, in brackets behind them; nothing if none has a name."""
    if not custom_ids:
        return ""
    shown = custom_ids[:MOST_NAMED]
    return f" ({', '.join(map(repr, shown))}{', …' if count > len(shown) else ''})"


def remarks(intake: Intake) -> Iterator[str]:
    """Why the results are not what a reader of the input may think, when a run is over."""
    if edited := intake.changed:
        yield (
            f"edited since they were answered, and left with their old lines: {len(edited)} rows "
            f"of {intake.path}{named(edited, len(edited))}; --retry-changed answers them again"
        )
    if intake.torn is not None:
        yield (
            f"{intake.path} ends within line {intake.torn + 1}: is it still being copied? That "
            "line is not answered; run the same command again when it is whole"
        )
    if intake.outdated:
        yield (
            f"{intake.path} was changed while it was read: run the same command again to answer "
            "what is new in it"
        )
